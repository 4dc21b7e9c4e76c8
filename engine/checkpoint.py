"""The checkpoints of a run: `last`, the one before it, `best` and a few numbered ones, each one file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from engine import atomic, checkpoint_file, sharded_checkpoint
from engine.checkpoint_file import TensorPath, join_tensors, split_tensors
from engine.distributed import Process
from engine.errors import InputError
from engine.run_folder import RunFolder

LOGGER = logging.getLogger("engine")

# For a tensor's place in a state and its size: the sharded tensor that it is divided like, or None
Shardings = Callable[[TensorPath, torch.Size], DTensor | None]


def load(path: Path, shardings: Shardings = lambda path, size: None) -> dict[str, Any]:
    """The content of a checkpoint; what would run code is refused.

    Args:
        shardings: of a sharded tensor this process gets its shard, all others are whole, on the CPU.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain values.
    """
    tensors, plain = split_tensors((sharded_checkpoint if path.is_dir() else checkpoint_file).load(path))
    for place, tensor in tensors.items():
        like = shardings(place, tensor.size())
        if like is not None:
            tensors[place] = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return join_tensors(tensors, plain)


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


def load_metadata(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, or what an exported file says of its model, without reading tensors.

    Raises:
        InputError: as `load`.
    """
    if path.is_dir():
        return sharded_checkpoint.load_metadata(path)
    if path.suffix == ".safetensors":
        return checkpoint_file.said_of_exported(path)
    return split_tensors(checkpoint_file.load(path, mmap=True))[1]


def class_names_in(path: str | Path) -> list[str] | None:
    """For which classes the head of weights is, by number; None if their file does not say it."""
    return load_metadata(Path(path)).get("class_names")


def verify(path: Path) -> None:
    """Compare a checkpoint of a run with its checksums, and see that its plain values can be read.

    Raises:
        InputError: missing, damaged, or no checkpoint of a run.
    """
    (sharded_checkpoint if path.is_dir() else checkpoint_file).verify(path)
    iteration = load_metadata(path).get("iteration")
    if not isinstance(iteration, int) or isinstance(iteration, bool) or not 0 <= iteration < 2**63:
        raise InputError(f"checkpoint {path} is not one of a run: it does not tell its iteration")


def check_structure(own: Any, saved: Any, place: str) -> None:
    """See that a saved state is built like the one that it is to replace: intact files may hold anybody's content.

    Empty dictionaries and lists and None say nothing about what replaces them; entries may be added.

    Raises:
        ValueError: something of `saved` is missing, or has another type or size than in `own`.
    """
    if own is None:
        return
    if _kind(own) != _kind(saved):
        raise ValueError(f"{place} is of type {type(saved).__name__}, not {type(own).__name__}")
    if isinstance(own, dict):
        for key, value in own.items():
            if key not in saved:
                raise ValueError(f"{place}.{key} is missing")
            check_structure(value, saved[key], f"{place}.{key}")
    elif isinstance(own, list | tuple):
        for index, (one, other) in enumerate(zip(own, saved, strict=False)):
            check_structure(one, other, f"{place}.{index}")
    elif isinstance(own, Tensor) and own.shape != saved.shape:
        raise ValueError(f"{place} has shape {tuple(saved.shape)}, not {tuple(own.shape)}")


def _kind(value: Any) -> type:
    """The type; numbers are alike, and all kinds of tensors and of dictionaries."""
    for kind in (Tensor, dict):
        if isinstance(value, kind):
            return kind
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


class CheckpointStore:
    """Writes and finds the checkpoints of a run.

    A new one is complete on the disk before it takes the name `last` and the old `last` becomes
    `previous`: whenever a save is interrupted, two intact checkpoints are there, or the only one so far. A damaged
    `last` is replaced at once.

    Args:
        keep: numbered checkpoints that stay.
        in_background: write in a thread while training goes on, from a copy in memory.
    """

    def __init__(self, folder: RunFolder, process: Process, keep: int = 0, in_background: bool = False) -> None:
        self._folder = folder
        self._process = process
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._writing: Future[None] | None = None  # what the thread does
        self._is_last_damaged = False

    def save(self, state: dict[str, Any], is_best: bool, is_numbered: bool) -> None:
        """Save a state with its `iteration`. All processes call it together.

        Raises:
            RunError: the disk refuses, now or at the save before this one.
        """
        self.wait()  # for the copy in memory that is being written: there is never a second one
        state = self._whole(state)
        if not self._process.is_main:
            return
        names = [self._folder.best] if is_best else []
        if is_numbered and self._keep:
            names.append(self._folder.checkpoints / f"iter_{state['iteration']}.pt")
        if self._thread is None:
            self._write(state, names)
        else:
            self._writing = self._thread.submit(self._write, state, names)

    def check(self) -> None:
        """Raise the error of a save in the background as soon as there is one, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk; raises the error of a save in the background, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> Path | None:
        """The newest intact checkpoint, the same for all processes; damaged ones before it are named in the log.

        Raises:
            InputError: all are damaged, or other processes do not see it.
        """
        found = self._process.broadcast(self._find().name if self._process.is_main and self._candidates() else None)
        path = self._folder.checkpoints / (found or self._folder.last.name)
        return path if self._process.agree(path.exists(), f"--resume: {path} exists") else None

    def _find(self) -> Path:
        problems = []
        for path in self._candidates():
            try:
                verify(path)
            except InputError as error:
                problems.append(str(error))
                continue
            self._is_last_damaged = path != self._folder.last
            for problem in problems:
                LOGGER.warning("WARNING: %s; using %s instead", problem, path.name)
            return path
        raise InputError(f"--resume: no intact checkpoint in {self._folder.checkpoints}: {'; '.join(problems)}")

    def _candidates(self) -> list[Path]:
        """Checkpoints, newest first."""
        folder = self._folder
        names = (folder.last, folder.previous, *reversed(folder.list_numbered()), folder.best)
        return [path for path in names if path.exists()]

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with what is sharded in one piece, on the main process; in the background a copy on the CPU."""
        tensors, plain = split_tensors(state)
        for path, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._process.is_main and (whole is not tensor or self._thread is not None):
                tensors[path] = whole.detach().to("cpu", copy=True)
        return join_tensors(tensors, copy.deepcopy(plain))

    def _write(self, state: dict[str, Any], names: list[Path]) -> None:
        """Write a file, give it its names, and remove what is not kept."""
        folder, staged = self._folder, self._folder.checkpoints / ".new.pt"
        with checkpoint_file.writing(folder.last):
            checkpoint_file.save(state, staged)
            if folder.last.is_file() and not self._is_last_damaged:
                atomic.link(folder.last, folder.previous)
            for name in (folder.last, *names):
                atomic.link(staged, name)
            self._is_last_damaged = False
            for old in folder.list_numbered()[: -self._keep] if self._keep else ():
                old.unlink()
            staged.unlink()
