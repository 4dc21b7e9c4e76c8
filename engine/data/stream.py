"""The order of training images, and the randomness of each, as functions of (seed, epoch, position).

Nothing depends on the number of loader workers or on when the run was resumed; and with the same
global batch, processes share the same order whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from engine.seeding import derive_seed, preserved_generators, seed_cpu


class SampleKey(NamedTuple):
    """Which image, and the seed of its random transforms."""

    index: int
    seed: int


@dataclass
class TrainingOrder(Sampler[list[SampleKey]]):
    """Micro-batches of one process, from step `first_iteration` to `last_iteration`, over all epochs.

    An epoch is a permutation of all images; what does not fill a global batch is left out.

    Attributes:
        micro_batch: images at once in one process; processes * accumulation of them make a global batch.
    """

    num_samples: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    first_iteration: int
    last_iteration: int

    @property
    def global_batch(self) -> int:
        """Images per step over all processes and micro-batches."""
        return self.micro_batch * self.accumulation * self.world_size

    def __len__(self) -> int:
        return (self.last_iteration - self.first_iteration) * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        iterations_per_epoch = self.num_samples // self.global_batch
        shuffled_epoch, permutation = -1, []
        for iteration in range(self.first_iteration, self.last_iteration):
            epoch, step_of_epoch = divmod(iteration, iterations_per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                permutation = torch.randperm(self.num_samples, generator=generator).tolist()
                shuffled_epoch = epoch
            for part in range(self.accumulation):
                first = step_of_epoch * self.global_batch + (part * self.world_size + self.rank) * self.micro_batch
                positions = range(first, first + self.micro_batch)
                yield [SampleKey(permutation[p], derive_seed(self.seed, epoch, p)) for p in positions]


class SeededDataset(Dataset):
    """Looks up samples by :class:`SampleKey`, with all random transforms seeded by the key."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: list[SampleKey]) -> list[Any]:
        with preserved_generators():  # with 0 workers these are also the training process's generators
            return [self._seeded_item(key) for key in keys]

    def _seeded_item(self, key: SampleKey) -> Any:
        seed_cpu(key.seed)
        return self._dataset[key.index]
