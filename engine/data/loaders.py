"""Loaders of one process: micro-batches for training, its share of the held-out images, what cannot be read of them."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from engine.config import PHOTOGRAPHS, Config, TrainConfig
from engine.data.images import IGNORED, Images, UnreadableImage
from engine.data.source import DataSource
from engine.data.stream import SampleKey, SeededDataset, TrainingOrder, held_out_order, sampling_weights
from engine.data.transforms import Delivery, normalisation
from engine.distributed import Process
from engine.errors import InputError, RunError, first_line
from engine.train_loop import HookBase

LOGGER = logging.getLogger("engine")
STEPS_PER_EPOCH = 16  # that small data should have at least
SMALLEST, LARGEST = 8, 64  # images per process: enough for BatchNorm, and a first guess at what fits into memory
Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) and targets: labels (B,), or of several ones (B, K) of 0 and 1
PATIENCE = 2.0  # seconds between a connection that broke and the notice that the process behind it is dead


def batch_for(num_samples: int, world_size: int) -> int:
    """A global batch that gives small data enough steps per epoch: a power of two for each process."""
    share = num_samples // world_size
    wanted = min(LARGEST, max(SMALLEST, share // STEPS_PER_EPOCH))
    return world_size << (max(1, min(wanted, share)).bit_length() - 1)


def accumulation_for(train: TrainConfig, world_size: int) -> int:
    """Micro-batches per step: the configured number, or the smallest with at most `train.micro_batch` images each.

    Raises:
        InputError: the global batch does not divide into them.
    """
    per_process, rest = divmod(train.global_batch, world_size)
    if rest:
        raise InputError(f"train.global_batch = {train.global_batch}: does not divide into {world_size} processes")
    divisors = [count for count in range(1, per_process + 1) if per_process % count == 0]
    if train.accumulation is None:
        most = train.micro_batch or per_process
        return next(count for count in divisors if per_process // count <= most)
    if train.accumulation not in divisors:
        raise InputError(
            f"train.accumulation = {train.accumulation}: {per_process} images of each of {world_size} processes "
            f"(train.global_batch = {train.global_batch}) do not divide into it; allowed is any of {divisors}"
        )
    return train.accumulation


class DataLoaders:
    """The data of a run, divided among processes, as one process sees it.

    Attributes:
        source: the data set.
        micro_batch: training images at once in one process.
        accumulation: micro-batches per step.
        max_iterations: steps of the whole run.
        bad_files: files that could not be read so far, held-out ones included.
        held_out: this process's share of the held-out images, each image in one share only.

    Raises:
        InputError: a global batch that does not fit the processes or the data.
    """

    def __init__(self, config: Config, source: DataSource, process: Process) -> None:
        train, images = config.train, len(source.train)
        if train.global_batch > images:
            raise InputError(f"train.global_batch = {train.global_batch}: more than the {images} training images")
        self._config, self._process, self.source = config, process, source
        self.accumulation = accumulation_for(train, process.world_size)
        self.micro_batch = train.global_batch // (process.world_size * self.accumulation)
        self.iterations_per_epoch = images // train.global_batch
        self.max_iterations = min(train.epochs * self.iterations_per_epoch, train.max_iters or sys.maxsize)
        self.bad_files = BadFiles(config.data.bad_files, logs=process.is_main)
        self.held_out = Batches(config, source, process, self.bad_files)

    def train_from(self, iteration: int) -> Generator[Batch]:
        """All micro-batches that are left, given the iterations already done."""
        sampling = self._config.data.sampling
        order = TrainingOrder(
            num_samples=len(self.source.train),
            repeats=self._config.data.repeats,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            rank=self._process.rank,
            world_size=self._process.world_size,
            seed=self._config.seed,
            first_iteration=iteration,
            last_iteration=self.max_iterations,
            weights=None if sampling is None else sampling_weights(self.source.train_labels, sampling),
            shards=self.source.train_shards,
        )
        return iter(Batches(self._config, self.source, self._process, self.bad_files, order))


def _begin_worker(trainer: int, worker: int) -> None:
    """What a loader's worker does first.

    A scheduler may signal every process of a job: the trainer finishes its step, and needs its workers for that. A
    worker whose trainer died while it was forked ends: torch would take its new parent for the trainer and wait for
    ever, and the connections that it has inherited would hide the death from the other processes of the run.

    Args:
        trainer: the process that made the loader.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if multiprocessing.get_start_method() == "fork" and os.getppid() != trainer:
        os._exit(1)


class BadFiles(HookBase):
    """The bad files that a run has met so far, each counted once.

    As a hook it brings together what the processes found, after each epoch and the last step. A checkpoint in between
    holds what the main process knows; the others' files are found again.

    Args:
        allowed: how many there may be, `data.bad_files`.
        logs: whether this process logs them.
    """

    state_name = "bad_files"

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

    def after_step(self) -> None:
        if self.trainer.iteration % self.trainer.data.iterations_per_epoch == 0 or self.trainer.is_last:
            self.unite(self.trainer.process)

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


def collate(samples: list[Any]) -> tuple[list[Tensor], list[UnreadableImage]]:
    """Of pairs (image, label) and bad files a batch [images (B, C, H, W), labels (B,)] and the bad files."""
    bad_files = [sample for sample in samples if isinstance(sample, UnreadableImage)]
    return default_collate(samples[: len(samples) - len(bad_files)]), bad_files


class Batches(Iterable[Batch]):
    """Images and labels on the device; each iteration over them has workers of its own.

    Args:
        bad_files: where unreadable files and damaged shards are recorded, and refused if there are too many.
        order: of the training images; None: this process's share of the held-out ones, in which what is no image has
            the label IGNORED.
    """

    def __init__(
        self,
        config: Config,
        source: DataSource,
        process: Process,
        bad_files: BadFiles,
        order: TrainingOrder | None = None,
    ) -> None:
        bad_files.record(source.damaged)
        self._bad_files, self._is_training = bad_files, order is not None
        if order is None:
            order = held_out_order(len(source.held_out), process.rank, process.world_size, config.evaluation.batch)
        self._order = order
        images = source.train if self._is_training else source.held_out
        self._size = len(images)
        self._to_decode = images if config.data.cache == "ram" and isinstance(images, Images) else None
        is_bytes = normalisation(config)[0] is not None and source.in_chans in PHOTOGRAPHS
        blank = torch.zeros(source.image_shape(config.data.image_size), dtype=torch.uint8 if is_bytes else None)
        self._dataset = SeededDataset(
            images,
            config.data.bad_files if self._is_training else None,
            (blank, source.no_target),
        )
        self._deliver = Delivery(config, process.device, self._is_training)
        self._loader = DataLoader(
            self._dataset,
            batch_sampler=self._order,
            num_workers=min(config.data.workers, os.cpu_count() or 1),  # their number changes no batch
            collate_fn=collate,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            pin_memory=process.device.type == "cuda",
            generator=torch.Generator(),  # torch draws a seed for the workers: not from the training's generator
        )

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Generator[Batch]:
        if self._to_decode is not None:
            self._to_decode.decode_all()  # here, so that no plan or help waits for it
        received = iter(self._loader)
        try:
            while (delivered := _next(received)) is not None:
                (images, labels), found = delivered
                self._bad_files.record(bad_file.args for bad_file in found)
                if self._is_training and IGNORED in labels:
                    raise InputError("none of the training images can be read")
                yield self._deliver(images, labels)
        finally:
            # The garbage collector may close the queue to them before it tells them to end, and they heed no SIGTERM
            if self._loader.num_workers:
                received._shutdown_workers()  # torch has no public name for it

    def examples(self, count: int) -> Tensor:
        """At most `count` images (B, C, H, W), spread over the data."""
        return self.images(range(0, self._size, math.ceil(self._size / count)))

    def images(self, numbers: Iterable[int]) -> Tensor:
        """Images (B, C, H, W) by their numbers in the data set, loaded by this process; black if unreadable."""
        pairs = self._dataset.__getitems__([SampleKey(number, seed=0) for number in numbers])
        return self._deliver(*collate(pairs)[0])[0]


def _next(received: Iterator[Any]) -> Any:
    """What `collate` gave, or None at the end."""
    try:
        return next(received, None)
    except (ConnectionError, EOFError, FileNotFoundError):  # a worker that died may leave a broken connection
        time.sleep(PATIENCE)  # cut short by torch's handler of the signal, which knows who died and why
        raise


@contextmanager
def worker_deaths(workers: int) -> Iterator[None]:
    """End the run with one line if a loader worker is killed or crashes; its exceptions stay as they are.

    torch reports a death from a signal handler, so in the middle of whatever the process is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        for worker in multiprocessing.active_children():
            worker.kill()  # it may wait for a lock that the dead one holds, and does not heed SIGTERM
        reason = first_line(error).rstrip(". ")
        raise RunError(
            f"a data loading worker died: {reason}; if memory ran out, lower data.workers (now {workers}) "
            "or train.micro_batch"
        ) from error
