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
