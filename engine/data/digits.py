"""scikit-learn's bundled handwritten digits: 1797 real images of 8 x 8 pixels in 10 classes, no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from engine.data.source import DataSource

TRAIN_SAMPLES = 1000  # the other 797 are held out
SPLIT_SEED = 0  # part of the data set's definition, not of a run
BRIGHTEST = 16.0  # pixels are counts from 0 to 16


def build_digits(image_size: int) -> DataSource:
    """The fixed split, standardised with the training images' mean and deviation, (1, S, S) each."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / BRIGHTEST
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held_out = order[:TRAIN_SAMPLES], order[TRAIN_SAMPLES:]
    images = (images - images[train].mean()) / images[train].std()
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return DataSource(
        train=TensorDataset(images[train], labels[train]),
        held_out=TensorDataset(images[held_out], labels[held_out]),
        num_classes=10,
        in_chans=1,
    )
