"""How many images make a step, and how they are divided into micro-batches."""

from __future__ import annotations

from engine.config import TrainConfig
from engine.errors import InputError

STEPS_PER_EPOCH = 16  # that small data should have at least
SMALLEST, LARGEST = 8, 64  # images per process: enough for BatchNorm, and a first guess at what fits into memory


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
