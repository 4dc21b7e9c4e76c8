"""The processes of a run, as torchrun starts them; one process if it did not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import InputError


@dataclass(frozen=True)
class Process:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, answer: bool, question: str) -> bool:
        """The answer that all processes give; InputError if they differ."""
        yes = int(self.sum(torch.tensor(int(answer), device=self.device)))
        if 0 < yes < self.world_size:
            raise InputError(f"{question} for {yes} of {self.world_size} processes only: all must share output_dir")
        return yes > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; they must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def launched_rank() -> int:
    """Rank given by the launcher, 0 without one."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[Process]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs) and leave them at the end."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size == 1:
        yield Process(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Process(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, process: Process) -> nn.Module:
    """The model under DistributedDataParallel, or itself in a single process."""
    if process.world_size == 1:
        return model
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
