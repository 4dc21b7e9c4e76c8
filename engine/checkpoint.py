"""Checkpoint files: written atomically, read without running code."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import InputError, RunError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` holds either the old content or the whole new one, never a part.

    Raises:
        RunError: the disk refuses; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"checkpoint {path} cannot be written: {error}; the one before it is still there") from error


def link(source: Path, path: Path) -> None:
    """Make `path` the same checkpoint as `source`, atomically; a copy where links are impossible."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    _put_in_place(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; files that would run code are refused.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a TorchScript archive, which is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"checkpoint {path} {_refusal(path, error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path} holds a {type(content).__name__}, no tensors by name")
    return content


def _refusal(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded, and what to do."""
    if "TorchScript" in str(error):
        return (
            "is a TorchScript archive, which holds code; if you trust it, make a state dict of it: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return "holds more than tensors and plain values, which could run code; save its state_dict() alone"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"is damaged or no checkpoint: {reason}"


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load a state dict strictly; a missing `mask_token` alone stays as it was initialised.

    Raises:
        InputError: names or shapes differ; the first few are listed.
    """
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - weights.keys() - {"mask_token"}]
    problems += [f"{name} is unknown to the model" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"checkpoint {source} is of another model: {listed}{more}")
    model.load_state_dict(weights, strict=False)


def _put_in_place(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must survive a power failure
    finally:
        os.close(folder)
