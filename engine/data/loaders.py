"""Loaders of one process: micro-batches for training, its share of the held-out images, what cannot be read of them."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from engine.config import Config, TrainConfig
from engine.data.files import UnreadableImage, reason_of
from engine.data.source import DataSource
from engine.data.stream import HeldOutShare, SeededDataset, TrainingOrder
from engine.data.transforms import Delivery, build_delivery, pixel_dtype
from engine.distributed import Process
from engine.errors import InputError, RunError

LOGGER = logging.getLogger("engine")
STEPS_PER_EPOCH = 16  # that small data should have at least
SMALLEST, LARGEST = 8, 64  # images per process: enough for BatchNorm, and a first guess at what fits into memory
WORKER_DIED = "DataLoader worker (pid"  # so begins torch's message
RAISED_IN_WORKER = "in DataLoader worker process"  # so goes on the message of a user's error, after "Caught OSError"
PATIENCE = 5.0  # seconds between a connection that broke and the notice that the process behind it is dead


@dataclass
class DataLoaders:
    """The data of a run, as one process sees it.

    Attributes:
        train_from: all micro-batches that are left, given the iterations already done.
        held_out: this process's share of the held-out images, each image in one share only.
        bad_files: files that could not be read so far, held-out ones included.
        micro_batch: training images at once in one process.
        accumulation: micro-batches per step.
        max_iterations: steps of the whole run.
        source: the data set.
    """

    train_from: Callable[[int], Batches]
    held_out: HeldOutLoader
    bad_files: BadFiles
    micro_batch: int
    accumulation: int
    iterations_per_epoch: int
    max_iterations: int
    source: DataSource


def batch_for(num_samples: int, world_size: int) -> int:
    """A global batch that gives small data enough steps per epoch: a power of two for each process."""
    share = num_samples // world_size
    wanted = min(LARGEST, max(SMALLEST, share // STEPS_PER_EPOCH))
    return world_size << (max(1, min(wanted, share)).bit_length() - 1)


def accumulation_for(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per step: the configured number, or the smallest with at most `train.micro_batch` images each.

    Raises:
        InputError: the global batch does not divide into them; which numbers it divides into is said.
    """
    per_process, rest = divmod(train.global_batch, world_size)
    if rest:
        fitting = [count for count in range(1, train.global_batch + 1) if train.global_batch % count == 0]
        nearest = [max(n for n in fitting if n < world_size), *(n for n in fitting if n > world_size)][:2]
        raise InputError(
            f"train.global_batch = {train.global_batch}: does not divide into {world_size} processes, whatever "
            f"train.accumulation is; use {' or '.join(map(str, nearest))} processes"
        )
    divisors = [count for count in range(1, per_process + 1) if per_process % count == 0]
    if train.accumulation is None:
        most = train.micro_batch or per_process
        return next(count for count in divisors if per_process // count <= most)
    if train.accumulation not in divisors:
        nearest = sorted(divisors, key=lambda count: abs(count - train.accumulation))[:3]
        raise InputError(
            f"train.accumulation = {train.accumulation}: {world_size} x {per_process} images of "
            f"train.global_batch = {train.global_batch} do not divide into it; "
            f"train.accumulation = {' or '.join(map(str, sorted(nearest)))} would do"
        )
    return train.accumulation


def build_loaders(config: Config, source: DataSource, process: Process) -> DataLoaders:
    """Divide the data among processes.

    Raises:
        InputError: a global batch that does not fit the processes or the data.
    """
    train, num_samples = config.train, len(source.train)
    if train.global_batch > num_samples:
        raise InputError(f"train.global_batch = {train.global_batch}: more than the {num_samples} training images")
    accumulation = accumulation_for(train, process.world_size)
    micro_batch = train.global_batch // (process.world_size * accumulation)
    iterations_per_epoch = num_samples // train.global_batch
    max_iterations = min(train.epochs * iterations_per_epoch, train.max_iters or sys.maxsize)

    bad_files = BadFiles(config.data.bad_files, logs=process.rank == 0)

    def train_from(iteration: int) -> Batches:
        order = TrainingOrder(
            num_samples=num_samples,
            repeats=config.data.repeats,
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=process.rank,
            world_size=process.world_size,
            seed=config.seed,
            first_iteration=iteration,
            last_iteration=max_iterations,
        )
        dataset = SeededDataset(source.train, attempts=config.data.bad_files + 1)
        loader = DataLoader(dataset, batch_sampler=order, **_loading(config, process))
        return Batches(loader, bad_files, build_delivery(config, process.device, is_training=True))

    return DataLoaders(
        train_from=train_from,
        held_out=build_held_out(config, source, process, bad_files),
        bad_files=bad_files,
        micro_batch=micro_batch,
        accumulation=accumulation,
        iterations_per_epoch=iterations_per_epoch,
        max_iterations=max_iterations,
        source=source,
    )


def build_held_out(
    config: Config, source: DataSource, process: Process, bad_files: BadFiles | None = None
) -> HeldOutLoader:
    """This process's share of the held-out images; what is no image has the label IGNORED.

    Args:
        bad_files: where unreadable files are counted; None counts those of this loader alone.
    """
    if bad_files is None:
        bad_files = BadFiles(config.data.bad_files, logs=process.rank == 0)
    blank = torch.zeros(source.image_shape(config.data.image_size), dtype=pixel_dtype(config))
    share = HeldOutShare(source.held_out, process.rank, process.world_size, blank)
    loader = DataLoader(share, batch_size=config.evaluation.batch, **_loading(config, process))
    return HeldOutLoader(loader, bad_files, build_delivery(config, process.device, is_training=False))


def _loading(config: Config, process: Process) -> dict[str, Any]:
    return {
        "num_workers": min(config.data.workers, os.cpu_count() or 1),  # their number changes no batch
        "collate_fn": collate,
        "worker_init_fn": _leave_signals_to_the_trainer,
        "pin_memory": process.device.type == "cuda",
    }


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A scheduler may signal every process of a job: the trainer finishes its step, and needs its workers for that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class BadFiles:
    """The bad files that a run has met so far, each counted once.

    Args:
        allowed: how many there may be, `data.bad_files`.
        logs: whether this process logs them.
    """

    def __init__(self, allowed: int, logs: bool = True) -> None:
        self.allowed = allowed
        self._logs = logs
        self._reasons: dict[str, str] = {}  # by name

    def __len__(self) -> int:
        return len(self._reasons)

    def record(self, found: Iterable[tuple[str, str]]) -> None:
        """Count files and log those that are new; InputError if there are more than allowed.

        A file that is not met again, because somebody repaired it, does not stop a run that was resumed.
        """
        for name, reason in found:
            is_new = name not in self._reasons
            self._reasons.setdefault(name, reason)
            count = len(self)
            if count > self.allowed:
                raise InputError(
                    f"data.bad_files = {self.allowed}: {name} cannot be read: {reason}; bad file number {count}: "
                    f"repair or remove it, or skip such files with data.bad_files={count} or more"
                )
            if is_new and self._logs:
                LOGGER.warning("bad file %d of %d allowed (data.bad_files): %s: %s", count, self.allowed, name, reason)

    def unite(self, process: Process) -> None:
        """Count what the other processes found too. All processes must call it together."""
        for reasons in process.gather(self._reasons):
            self.record(item for item in reasons.items() if item[0] not in self._reasons)

    def state_dict(self) -> dict[str, Any]:
        """Names and reasons, for a checkpoint."""
        return {"reasons": dict(self._reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._reasons = dict(state["reasons"])


def collate(samples: list[Any]) -> tuple[list[Tensor] | None, list[UnreadableImage]]:
    """A batch [images (B, C, H, W), labels (B,)] and the bad files met in making it.

    Args:
        samples: pairs (image, label) and bad files; None is an image for which no other could be found.
    """
    bad_files = [sample for sample in samples if isinstance(sample, UnreadableImage)]
    pairs = [sample for sample in samples if not isinstance(sample, UnreadableImage)]
    return None if any(pair is None for pair in pairs) else default_collate(pairs), bad_files


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Delivered pairs (images (B, C, H, W), labels (B,)) of a loader whose bad files are recorded.

    Raises:
        InputError: more bad files than allowed.
        RunError: a worker died.
    """

    def __init__(self, loader: DataLoader, bad_files: BadFiles, deliver: Delivery) -> None:
        self._bad_files = bad_files
        self._deliver = deliver
        self._workers = loader.num_workers
        with worker_deaths(self._workers):
            self._batches = iter(loader)  # draws from the global generator: not to be put off to the first batch

    def __next__(self) -> tuple[Tensor, Tensor]:
        with worker_deaths(self._workers):
            delivered = self._receive()
        if delivered is None:
            raise StopIteration
        batch, found = delivered
        self._bad_files.record(bad_file.args for bad_file in found)
        if batch is None:
            name, reason = found[0].args
            raise InputError(f"no training image can be read in place of {name}, which cannot either: {reason}")
        return self._deliver(*batch)

    def close(self) -> None:
        """End the workers. The garbage collector may close the queue to them before it tells them to end,
        and they heed no SIGTERM."""
        if self._workers:
            self._batches._shutdown_workers()  # torch has no public name for it

    def _receive(self) -> Any:
        """What `collate` gave, or None at the end; a connection that a dead worker left broken is its death."""
        try:
            return next(self._batches, None)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if not self._workers or RAISED_IN_WORKER in str(error):
                raise
            time.sleep(PATIENCE)  # cut short by torch's handler of the signal, which knows who died and why
            raise RuntimeError(f"{WORKER_DIED} unknown) is gone: {reason_of(error)}") from error


class HeldOutLoader:
    """This process's held-out images, to be gone through many times, as :class:`Batches`."""

    def __init__(self, loader: DataLoader, bad_files: BadFiles, deliver: Delivery) -> None:
        self._loader = loader
        self._deliver = deliver
        self.bad_files = bad_files

    def __len__(self) -> int:
        return len(self._loader)

    def examples(self, count: int) -> Tensor:
        """At most `count` images (B, C, H, W), spread over the data, loaded by this process; black if unreadable."""
        dataset = self._loader.dataset
        positions = range(0, len(dataset), math.ceil(len(dataset) / count))
        pairs = dataset.__getitems__(list(positions))[: len(positions)]
        images, _ = self._deliver(*default_collate(pairs))
        return images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with closing(Batches(self._loader, self.bad_files, self._deliver)) as batches:
            yield from batches


@contextmanager
def worker_deaths(workers: int) -> Iterator[None]:
    """End the run with one line if a loader worker is killed or crashes; its exceptions stay as they are.

    torch reports a death from a signal handler, so in the middle of whatever the process is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        for worker in multiprocessing.active_children():
            worker.kill()  # it may wait for a lock that the dead one holds, and does not heed SIGTERM
        reason = str(error).splitlines()[0].rstrip(". ")
        raise RunError(
            f"a data loading worker died: {reason}; if memory ran out, lower data.workers (now {workers}) "
            "or train.micro_batch"
        ) from error
