"""Random images with learnable labels, for trying a configuration or a machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.data.source import DataSource
from engine.seeding import derive_seed

NUM_CLASSES = 10
TRAIN, HELD_OUT = 0, 1


class SyntheticImages(Dataset):
    """Noise around a brightness that depends on the label; each image is made when it is asked for."""

    def __init__(self, split: int, samples: int, image_size: int) -> None:
        self._split = split
        self._samples = samples
        self._image_size = image_size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % NUM_CLASSES
        generator = torch.Generator().manual_seed(derive_seed(self._split, index))
        noise = torch.randn(3, self._image_size, self._image_size, generator=generator)
        return noise + (label - (NUM_CLASSES - 1) / 2) / NUM_CLASSES, label


def build_synthetic(image_size: int, samples: int) -> DataSource:
    """Ten classes of three-channel images; training and held-out images differ."""
    return DataSource(
        train=SyntheticImages(TRAIN, samples, image_size),
        held_out=SyntheticImages(HELD_OUT, samples, image_size),
        num_classes=NUM_CLASSES,
        in_chans=3,
    )
