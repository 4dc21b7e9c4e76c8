"""Folders of shards, as versions before wrote them under FSDP2: read, by any number of processes, and never written."""

from __future__ import annotations

import pickle
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from engine import checkpoint_file
from engine.checkpoint_file import join_tensors
from engine.errors import InputError, first_line

PLAIN = "state.pt"  # everything but tensors, where the tensors belong, and the checksums of the other files

INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13's name for it
}  # fmt: skip


def load(folder: Path) -> dict[str, Any]:
    """The state in `folder`, its tensors whole.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain values.
    """
    content = _load_plain(folder)
    try:
        stored = _SafeReader(folder).read_metadata().state_dict_metadata
        tensors = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in content["places"]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled", category=UserWarning)
            dcp.load(tensors, storage_reader=_SafeReader(folder), no_dist=True)
        return join_tensors({tuple(content["places"][key]): tensors[key] for key in tensors}, content["plain"])
    except (Exception, dcp.CheckpointException) as error:  # a damaged folder makes the reader raise whatever there is
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise InputError(f"checkpoint {folder} is damaged or no checkpoint: {first_line(error)}") from error


def load_metadata(folder: Path) -> dict[str, Any]:
    """The state without its tensors."""
    return _load_plain(folder)["plain"]


def verify(folder: Path) -> None:
    """Compare all files with their checksums.

    Raises:
        InputError: a file is missing or damaged.
    """
    for name, checksum in _load_plain(folder)["checksums"].items():
        try:
            fits = zlib.crc32((folder / name).read_bytes()) == checksum
        except OSError as error:
            raise InputError(f"checkpoint {folder} is damaged: {name}: {error.strerror}") from error
        if not fits:
            raise InputError(f"checkpoint {folder} is damaged: the checksum of {name} does not fit")


def _load_plain(folder: Path) -> dict[str, Any]:
    content = checkpoint_file.load(folder / PLAIN)
    if not all(isinstance(content.get(key), dict) for key in ("plain", "places", "checksums")):
        raise InputError(f"checkpoint {folder} is damaged or no checkpoint: {PLAIN} is of something else")
    return content


class _SafeReader(dcp.FileSystemReader):
    """Reads the index of a checkpoint, a pickle, without running code that somebody put into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(self.path / ".metadata", "rb") as index:
            metadata = _IndexUnpickler(index).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Makes nothing but what describes tensors: no pickled objects (BytesStorageMetadata), no functions."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which could run code")
