"""A checkpoint in one file: written atomically, verified and read without running code."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine import atomic
from engine.errors import InputError, first_line, input_errors, writing_errors

EXPORTED = "augsub"  # key of an exported file's metadata
TensorPath = tuple[Any, ...]  # the keys that lead to a tensor in nested dictionaries


def split_tensors(state: dict[Any, Any]) -> tuple[dict[TensorPath, Tensor], dict[Any, Any]]:
    """Tensors of nested dictionaries, and the same dictionaries without them. Lists and tuples are plain values."""
    tensors: dict[TensorPath, Tensor] = {}

    def without_tensors(content: dict[Any, Any], path: TensorPath) -> dict[Any, Any]:
        plain = {}
        for key, value in content.items():
            if isinstance(value, Tensor):
                tensors[(*path, key)] = value
            else:
                plain[key] = without_tensors(value, (*path, key)) if isinstance(value, dict) else value
        return plain

    return tensors, without_tensors(state, ())


def join_tensors(tensors: dict[TensorPath, Tensor], plain: dict[Any, Any]) -> dict[Any, Any]:
    """The state that `split_tensors` took apart, in `plain`."""
    for (*path, key), tensor in tensors.items():
        content = plain
        for step in path:
            content = content.setdefault(step, {})
        content[key] = tensor
    return plain


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` holds either the old content or the whole new one, never a part.

    What the disk refuses is told by `writing`.
    """
    with atomic.new_content(path) as file:
        torch.save(state, file)


def writing(path: Path) -> AbstractContextManager[None]:
    """Tell the user, as a RunError, why the checkpoint `path` cannot be written, and what to do."""
    remedy = "Make room or give write access, then continue with --resume"
    return writing_errors(f"checkpoint {path}", f"; the one before it is still there. {remedy}")


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; files that would run code are refused.

    Args:
        mmap: read tensors when they are used, for who wants the plain values only; nothing is verified.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not mmap:
            verify(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):  # timm keeps its options there
            warnings.simplefilter("ignore", UserWarning)  # of a TorchScript archive, which is refused below
            mmap = mmap and zipfile.is_zipfile(path)  # files older than torch 1.6 can only be read whole
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise whatever there is
        raise InputError(f"checkpoint {path} {_refusal(path, error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds a {type(content).__name__}, no tensors by name")
    return content


def said_of_exported(path: Path) -> dict[str, Any]:
    """What a file of safetensors says of its model, by the keys of a checkpoint; nothing unless it was exported here.

    Raises:
        InputError: it is no such file.
    """
    with input_errors(f"checkpoint {path}", SafetensorError, ValueError, OSError), safe_open(path, "pt") as opened:
        said = json.loads((opened.metadata() or {}).get(EXPORTED, "{}"))
        if not isinstance(said, dict):
            raise ValueError(f"its metadata {EXPORTED!r} is no mapping")
    return said


def verify(path: Path) -> None:
    """Compare the file with the checksums (CRC-32 of each tensor) that torch.save put into it.

    Files older than torch 1.6 have none.

    Raises:
        InputError: missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    refusals = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile)
    with input_errors(f"checkpoint {path} is damaged or no checkpoint", *refusals):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise InputError(f"checkpoint {path} is damaged: the checksum of {damaged} does not fit")


def _refusal(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded, and what to do."""
    if "TorchScript" in str(error):
        return (
            "is a TorchScript archive, which holds code; if you trust it, make a state dict of it: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return "holds more than tensors and plain values, which could run code; save its state_dict() alone"
    if isinstance(error, pickle.UnpicklingError):
        return "is damaged or no checkpoint"  # torch says how to trust it
    return f"is damaged or no checkpoint: {first_line(error)}"
