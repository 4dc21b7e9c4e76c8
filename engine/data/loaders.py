"""Loaders of one process: micro-batches for training, its share of the held-out images."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from engine.config import UNTRANSFORMED, Config
from engine.data.bad_files import BadFiles
from engine.data.batch_sizes import accumulation_for
from engine.data.batches import Batches, HeldOutLoader, collate
from engine.data.delivery import build_delivery
from engine.data.digits import build_digits
from engine.data.held_out import HeldOutShare
from engine.data.images import build_held_out_images, build_images
from engine.data.source import DataSource
from engine.data.stream import SeededDataset, TrainingOrder
from engine.data.synthetic import build_synthetic
from engine.data.transforms import pixel_dtype
from engine.distributed import Process
from engine.errors import InputError


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


def build_source(config: Config) -> DataSource:
    """The data set that `data.dataset` names."""
    data = config.data
    if data.dataset == "digits":
        return build_digits(data.image_size)
    if data.dataset == "synthetic":
        return build_synthetic(data.image_size, data.synthetic_samples)
    return build_images(data, config.transform)


def build_held_out_source(config: Config) -> DataSource:
    """The held-out images alone of the data set that `data.dataset` names, of which more need not be there."""
    if config.data.dataset in UNTRANSFORMED:
        return build_source(config)
    return build_held_out_images(config.data, config.transform)


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
