"""A checkpoint of sharded tensors: a folder that torch.distributed.checkpoint fills, every process its own shards.

The folder can be read by any number of processes, one without a process group included.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engine import atomic, checkpoint_file
from engine.checkpoint_file import TensorPath, join_tensors, split_tensors
from engine.distributed import Process
from engine.errors import InputError, first_line

PLAIN = "state.pt"  # everything but tensors, where the tensors belong, and the checksums of the other files
CHUNK = 1 << 24  # bytes read at once

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

# For a tensor's place in a state and its size: the sharded tensor that it is divided like, or None
Shardings = Callable[[TensorPath, torch.Size], DTensor | None]


def unsharded(path: TensorPath, size: torch.Size) -> None:
    """Every tensor is whole."""


def shardings_of(state: dict[str, Any], optimizer: Optimizer) -> Shardings:
    """How the tensors of a trainer's state are divided among the processes.

    The states of a fresh optimiser are not there yet: those of a parameter's size are sharded like the parameter.
    """
    own, _ = split_tensors(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def sharding(path: TensorPath, size: torch.Size) -> DTensor | None:
        tensor = parameters[path[2]] if path[:2] == ("optimizer", "state") else own.get(path)
        return tensor if isinstance(tensor, DTensor) and tensor.size() == size else None

    return sharding


def save(state: dict[str, Any], folder: Path, process: Process) -> None:
    """Write `state` into `folder`, which appears when it is complete. All processes must call it together.

    Raises:
        RunError: the disk refuses; the folder does not appear.
    """
    tensors, plain = split_tensors(state)
    keys = {"/".join(map(str, path)): path for path in tensors}
    temporary = atomic.temporary_name(folder)
    with checkpoint_file.writing(folder):
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        process.barrier()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.distributed is disabled", category=UserWarning)
                dcp.save(
                    {key: tensors[path] for key, path in keys.items()},
                    storage_writer=dcp.FileSystemWriter(temporary),
                    # what all processes have is saved as the main process has it
                    planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                    no_dist=process.world_size == 1,
                )
        except dcp.CheckpointException as error:
            raise OSError(first_line(_cause(error))) from error
        own = {path.name: _checksum(path) for path in sorted(temporary.glob(f"__{process.rank}_*"))}
        if process.is_main:
            own[".metadata"] = _checksum(temporary / ".metadata")
        checksums = {name: value for part in process.gather(own) for name, value in part.items()}
        if process.is_main:
            places = {key: list(path) for key, path in keys.items()}
            checkpoint_file.save({"plain": plain, "places": places, "checksums": checksums}, temporary / PLAIN)
            shutil.rmtree(folder, ignore_errors=True)
            atomic.put_in_place(temporary, folder)
        process.barrier()


def load(folder: Path, shardings: Shardings = unsharded) -> dict[str, Any]:
    """The state in `folder`. Processes may call it together or alone.

    Args:
        shardings: of a sharded tensor only this process's shard is read, all others whole, on the CPU.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain values.
    """
    content = _load_plain(folder)
    try:
        stored = _SafeReader(folder).read_metadata().state_dict_metadata
        paths = {key: tuple(path) for key, path in content["places"].items()}
        tensors = {key: _empty(stored[key], shardings(path, stored[key].size)) for key, path in paths.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled", category=UserWarning)
            dcp.load(tensors, storage_reader=_SafeReader(folder), no_dist=True)
        return join_tensors({path: tensors[key] for key, path in paths.items()}, content["plain"])
    except (Exception, dcp.CheckpointException) as error:  # a damaged folder makes the reader raise whatever there is
        raise InputError(f"checkpoint {folder} is damaged or no checkpoint: {first_line(_cause(error))}") from error


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
            fits = _checksum(folder / name) == checksum
        except OSError as error:
            raise InputError(f"checkpoint {folder} is damaged: {name}: {error.strerror}") from error
        if not fits:
            raise InputError(f"checkpoint {folder} is damaged: the checksum of {name} does not fit")


def _load_plain(folder: Path) -> dict[str, Any]:
    content = checkpoint_file.load(folder / PLAIN)
    if not all(isinstance(content.get(key), dict) for key in ("plain", "places", "checksums")):
        raise InputError(f"checkpoint {folder} is damaged or no checkpoint: {PLAIN} is of something else")
    return content


def _empty(stored: Any, like: DTensor | None) -> Tensor:
    """What a stored tensor is read into, whole or divided like another one."""
    if like is None:
        return torch.empty(stored.size, dtype=stored.properties.dtype)
    return torch.empty_like(like, dtype=stored.properties.dtype, requires_grad=False)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as content:
        while chunk := content.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the first process that failed; its own message would be tracebacks of all of them."""
    if isinstance(error, dcp.CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


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
