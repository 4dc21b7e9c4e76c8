"""A pair of data sets, for training and for evaluation, and what a model must know of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset


@dataclass
class DataSource:
    """Data sets of (image (C, H, W), label), which may raise UnreadableImage, and the shape of the task."""

    train: Dataset
    held_out: Dataset
    num_classes: int
    in_chans: int


# In place of data that is not there, to count and to plan with: it has the size of ImageNet-1k, and no image
IMAGENET = DataSource(train=range(1_281_167), held_out=range(50_000), num_classes=1000, in_chans=3)
