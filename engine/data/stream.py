"""The order of images: of training images and their randomness as functions of (seed, epoch, position).

Nothing depends on the number of loader workers or on when the run was resumed; and with the same
global batch, processes share the same order whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from engine.data.images import UnreadableImage
from engine.seeding import derive_seed, preserved_generators, seed_cpu

STREAMS = 16  # shards of which an epoch takes images in turn; so many are open in a process


class SampleKey(NamedTuple):
    """Which image, and the seed of its random transforms."""

    index: int
    seed: int


@dataclass
class TrainingOrder(Sampler[list[SampleKey]]):
    """Micro-batches of one process, from step `first_iteration` to `last_iteration`, over all epochs.

    An epoch is a permutation of all images, each one `repeats` times in a row, cut off after as many
    global batches as the images alone would fill (repeated augmentation, arXiv 1902.05509, as DeiT
    samples). Neighbours in that sequence go to different micro-batches of their global batch; if there
    are as many of those as copies, the copies of an image meet neither in mixup nor in BatchNorm. How
    many of the micro-batches are computed side by side and how many one after the other changes none.

    Attributes:
        repeats: copies of an image, each with a random transform of its own.
        micro_batch: images at once in one process; processes * accumulation of them make a global batch.
        weights: of the images, (N,): an epoch is drawn by them with replacement; None: a permutation.
        shards: in which shard each image lies, (N,); None: they can be read in any order.
    """

    num_samples: int
    repeats: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    first_iteration: int
    last_iteration: int
    weights: Tensor | None = None
    shards: Tensor | None = None

    @property
    def parts(self) -> int:
        """Micro-batches in a global batch, over all processes."""
        return self.accumulation * self.world_size

    @property
    def iterations_per_epoch(self) -> int:
        """Global batches that the images fill."""
        return self.num_samples // (self.micro_batch * self.parts)

    def epoch_images(self, epoch: int) -> list[int]:
        """Indices of the images of an epoch, in the order of the global batches."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        length = self.iterations_per_epoch * self.micro_batch * self.parts
        count = math.ceil(length / self.repeats)
        if self.weights is None:
            shuffled = torch.randperm(self.num_samples, generator=generator)[:count]
        else:  # torch.multinomial takes no more than 2**24 images
            ends = self.weights.cumsum(0)
            shuffled = torch.searchsorted(ends, ends[-1] * torch.rand(count, generator=generator, dtype=ends.dtype))
        if self.shards is not None:
            shuffled = shuffled[order_by_shards(self.shards[shuffled], generator)]
        return shuffled.repeat_interleave(self.repeats)[:length].tolist()

    def __len__(self) -> int:
        return (self.last_iteration - self.first_iteration) * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        shuffled_epoch, images = -1, []
        for iteration in range(self.first_iteration, self.last_iteration):
            epoch, step_of_epoch = divmod(iteration, self.iterations_per_epoch)
            if epoch != shuffled_epoch:
                shuffled_epoch, images = epoch, self.epoch_images(epoch)
            first = step_of_epoch * self.micro_batch * self.parts
            end = first + self.micro_batch * self.parts
            for part in range(self.accumulation):
                positions = range(first + part * self.world_size + self.rank, end, self.parts)
                yield [SampleKey(images[p], derive_seed(self.seed, epoch, p)) for p in positions]


def order_by_shards(shards: Tensor, generator: torch.Generator) -> Tensor:
    """An order of images, (N,), in which few shards are read at a time.

    Shards in a random order are dealt out to streams, and streams take turns, each as often as it has images: so the
    longer ones end with the others. Images of one shard keep their order. It follows from shards and generator alone.

    Args:
        shards: the shard of each image, (N,), images in a random order.
    """
    _, shards = shards.unique(return_inverse=True)
    count = int(shards.max()) + 1
    places = torch.randperm(count, generator=generator)[shards]  # of the images' shards in the epoch
    streams = places % min(STREAMS, count)
    by_shard = places.argsort(stable=True)
    by_stream = by_shard[streams[by_shard].argsort(stable=True)]
    lengths = streams.bincount()
    number = torch.arange(len(shards)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # in its stream
    time = (number.double() + 0.5) / lengths.repeat_interleave(lengths)
    return by_stream[time.argsort(stable=True)]


def held_out_order(num_images: int, rank: int, world_size: int, batch: int) -> list[list[SampleKey]]:
    """Batches of one process: images rank, rank + world_size, …; an index past the last image stands for none.

    Every process thus makes the same number of forwards, and each image is in one share only.
    """
    padded = math.ceil(num_images / world_size) * world_size
    share = [SampleKey(index, seed=0) for index in range(rank, padded, world_size)]
    return [share[start : start + batch] for start in range(0, len(share), batch)]


def sampling_weights(labels: np.ndarray, sampling: str) -> Tensor:
    """Weights (N,) float64 of images with these labels, so that classes come by a power of their size: its square root
    for `sqrt`, none for `balanced`."""
    _, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return torch.from_numpy(counts[own] ** (-1.0 if sampling == "balanced" else -0.5))


class SeededDataset(Dataset):
    """Looks up pairs (image, label) by :class:`SampleKey`, with all random transforms seeded by the key.

    An image that cannot be read is replaced by the next one that can, under the same seed.

    Args:
        bad_files: that may be met for one sample; None: nothing is replaced.
        blank: stands for what is no image, (C, H, W), with its target, IGNORED throughout.
    """

    def __init__(self, dataset: Dataset, bad_files: int | None, blank: tuple[Tensor, Any]) -> None:
        self._dataset, self._bad_files, self._blank = dataset, bad_files, blank

    def __getitems__(self, keys: list[SampleKey]) -> list[Any]:
        """A pair for each key, and after them the bad files met."""
        bad_files: list[UnreadableImage] = []
        with preserved_generators():  # with 0 workers these are also the training process's generators
            return [self._item(key, bad_files) for key in keys] + bad_files

    def _item(self, key: SampleKey, bad_files: list[UnreadableImage]) -> tuple[Any, Any]:
        count, met = len(self._dataset), set()  # a whole shard is one bad file
        seed_cpu(key.seed)
        for index in range(key.index, key.index + count if key.index < count else 0):  # one that fails draws nothing
            try:
                image, target = self._dataset[index % count]
                return image, target if np.ndim(target) else int(target)
            except UnreadableImage as error:
                bad_files.append(UnreadableImage(*error.args))  # without its traceback
                met.add(error.args)
                if self._bad_files is None or len(met) > self._bad_files:
                    break
        return self._blank
