"""Loaders of one process: micro-batches for training, its share of the held-out images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from engine.config import Config, TrainConfig
from engine.data.digits import build_digits
from engine.data.images import build_images
from engine.data.source import DataSource
from engine.data.stream import SeededDataset, TrainingOrder
from engine.data.synthetic import build_synthetic
from engine.distributed import Process
from engine.errors import InputError


@dataclass
class DataLoaders:
    """The data of a run, as one process sees it.

    Attributes:
        train_from: all micro-batches that are left, given the iterations already done.
        held_out: this process's share of the held-out images, each image in one share only.
        micro_batch: training images at once in one process.
        accumulation: micro-batches per step.
        max_iterations: steps of the whole run.
    """

    train_from: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    held_out: DataLoader
    num_classes: int
    in_chans: int
    micro_batch: int
    accumulation: int
    iterations_per_epoch: int
    max_iterations: int


def build_source(config: Config) -> DataSource:
    """The data set that `data.dataset` names."""
    data = config.data
    if data.dataset == "digits":
        return build_digits(data.image_size)
    if data.dataset == "synthetic":
        return build_synthetic(data.image_size, data.synthetic_samples)
    return build_images(data, config.transform)


def build_loaders(config: Config, process: Process) -> DataLoaders:
    """Open the data and divide it among processes.

    Raises:
        InputError: data that cannot be opened, or a global batch that does not fit the processes
            or the data.
    """
    source = build_source(config)
    train, num_samples = config.train, len(source.train)
    if train.global_batch > num_samples:
        raise InputError(f"train.global_batch = {train.global_batch}: more than the {num_samples} training images")
    accumulation = accumulation_for(train, process.world_size)
    micro_batch = train.global_batch // (process.world_size * accumulation)
    iterations_per_epoch = num_samples // train.global_batch
    max_iterations = min(train.epochs * iterations_per_epoch, train.max_iters or sys.maxsize)
    workers = {
        "num_workers": min(config.data.workers, os.cpu_count() or 1),  # their number changes no batch
        "pin_memory": process.device.type == "cuda",
    }

    def train_from(iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
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
        return iter(DataLoader(SeededDataset(source.train), batch_sampler=order, **workers))

    share = range(process.rank, len(source.held_out), process.world_size)
    return DataLoaders(
        train_from=train_from,
        held_out=DataLoader(Subset(source.held_out, share), batch_size=config.evaluation.batch, **workers),
        num_classes=source.num_classes,
        in_chans=source.in_chans,
        micro_batch=micro_batch,
        accumulation=accumulation,
        iterations_per_epoch=iterations_per_epoch,
        max_iterations=max_iterations,
    )


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
