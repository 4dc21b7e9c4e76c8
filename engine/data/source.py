"""A pair of data sets, what a model must know of them, and whether they are those that weights come from.

What a checkpoint says of its data is `DataSource.facts`. `data.allow_mismatch` turns a refusal into a warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from engine.config import Config, sides
from engine.data.images import IGNORED
from engine.errors import InputError
from engine.seeding import derive_seed

LOGGER = logging.getLogger("engine")
TRAIN_DIGITS = 1000  # the other 797 are held out
SYNTHETIC_CLASSES = 10


@dataclass
class DataSource:
    """Data sets of (image (C, H, W), label), which may raise UnreadableImage, and the shape of the task.

    Attributes:
        train: None where the source is for evaluation alone.
        num_classes: outputs of the model.
        class_names: by label; their numbers if none are given.
        candidates: numbers of the model's classes among which it chooses, in the order of the labels; None: all.
        has_several_labels: whether an image may have several labels, or none: targets are (K,) of 0 and 1.
        accepted: (N, M) all right classes of N images, filled up with IGNORED, of which labels are rows; None: labels
            are the classes.
    """

    train: Dataset | None
    held_out: Dataset
    num_classes: int
    in_chans: int
    class_names: Sequence[str] = ()
    candidates: Sequence[int] | None = None
    accepted: Tensor | None = None
    has_several_labels: bool = False

    def __post_init__(self) -> None:
        self.class_names = tuple(self.class_names or map(str, range(self.num_classes)))

    def image_shape(self, image_size: int | Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) of what `data.image_size` says."""
        return self.in_chans, *sides(image_size)

    @property
    def left_out(self) -> dict[str, str]:
        """Files in the folders of each split that are no images: `training` to "12 .txt, 3 hidden"."""
        return {
            name: ", ".join(f"{count} {suffix}" for suffix, count in found.most_common())
            for name, dataset in self._splits.items()
            if (found := getattr(dataset, "left_out", None))
        }

    @property
    def no_target(self) -> Tensor | int:
        """The target of what is no image, IGNORED throughout."""
        return torch.full((self.num_classes,), float(IGNORED)) if self.has_several_labels else IGNORED

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Shards that cannot be read to their end, and why."""
        return [found for dataset in self._splits.values() for found in getattr(dataset, "damaged", ())]

    @property
    def train_shards(self) -> Tensor | None:
        """In which shard each training image lies, (N,); None if they can be read in any order."""
        shards = getattr(self.train, "shards", None)
        return None if shards is None else torch.from_numpy(shards)

    @cached_property
    def train_labels(self) -> np.ndarray:
        """The labels (N,) of the training images, or their targets (N, K); InputError if the data set lists none."""
        dataset = self.train
        labels = dataset.tensors[1].numpy() if isinstance(dataset, TensorDataset) else dataset.labels
        if len(labels) != len(dataset):
            raise InputError("loss.class_weights, data.sampling: need a data set that lists its labels")
        return labels

    @property
    def _splits(self) -> dict[str, Dataset]:
        splits = {"training": self.train, "held-out": self.held_out}
        return {name: dataset for name, dataset in splits.items() if dataset is not None}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of the data of its run."""
        return {
            "data": {"num_classes": self.num_classes, "in_chans": self.in_chans},
            "class_names": list(self.class_names),
            "fingerprints": {name: fingerprint(dataset) for name, dataset in self._splits.items()},
        }


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """The number of `images`, and a `sha256` over what the data set lists of them.

    Of a folder these are the paths from its root on and the labels, in their order; of a data set of torchvision or
    Hugging Face the labels; of others nothing, so that their number alone counts. Pixels are not part of it, nor is the
    place where the data lie.
    """
    digest = hashlib.sha256()
    for line in getattr(dataset, "listing", tuple)():
        digest.update(line.encode(errors="surrogateescape") + b"\0")  # which no path contains
    return {"images": len(dataset), "sha256": digest.hexdigest()}


def check_classes(config: Config, class_names: Sequence[str], known: Any, weights: str) -> None:
    """Compare the classes of the data with those that the outputs of a model stand for.

    Args:
        class_names: of the data, by number.
        known: those of the weights, by number; anything but a list says nothing.
        weights: whose they are, for the message.

    Raises:
        InputError: others, or the same ones in another order.
    """
    if not known or not isinstance(known, list | tuple):
        return
    pairs = enumerate(zip_longest(known, class_names))
    different = [(number, theirs, own) for number, (theirs, own) in pairs if theirs != own]
    if different:
        number, theirs, own = different[0]
        difference = (
            f"{weights} is for other classes than the data have, or numbers them in another order: {len(different)} "
            f"differ, number {number} is {theirs}, in the data {own}"
        )
        if None in different[-1]:  # the model's outputs do not fit, whatever is meant
            raise InputError(difference)
        _refuse(config, difference)


def check_resumed(config: Config, source: DataSource, facts: dict[str, Any], checkpoint: Path) -> None:
    """Compare the data with those of the run that goes on: another image changes epochs, order and schedule.

    Args:
        facts: plain values of the checkpoint.

    Raises:
        InputError: other classes, or other training or held-out images.
    """
    check_classes(config, source.class_names, facts.get("class_names"), f"--resume: checkpoint {checkpoint}")
    saved = facts.get("fingerprints")
    if not isinstance(saved, dict):
        LOGGER.info("checkpoint %s does not tell its images: whether the data are the same is not checked", checkpoint)
        return
    for split, own in source.facts["fingerprints"].items():
        if (before := saved.get(split)) != own:
            images = before.get("images") if isinstance(before, dict) else None
            found = f"{own['images']}, the run has {images}; or with other names or labels"
            _refuse(config, f"--resume: the {split} images are not those of {checkpoint}: {found}")


def _refuse(config: Config, difference: str) -> None:
    if not config.data.allow_mismatch:
        raise InputError(f"{difference}; data.allow_mismatch=true goes on all the same")
    LOGGER.warning("WARNING: %s (data.allow_mismatch)", difference)


# In place of data that is not there, to count and to plan with: it has the size of ImageNet-1k, and no image
IMAGENET = DataSource(train=range(1_281_167), held_out=range(50_000), num_classes=1000, in_chans=3)


def build_digits(image_size: int | Sequence[int]) -> DataSource:
    """scikit-learn's bundled handwritten digits: 1797 real images of 8 x 8 pixels in 10 classes, no download.

    The split is fixed; images (1, S, S) are standardised with the training images' mean and deviation.
    """
    from sklearn.datasets import load_digits  # here: other data need not wait for scikit-learn

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # counts from 0 to 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    images = (images - images[train].mean()) / images[train].std()
    if sides(image_size) != images.shape[-2:]:
        images = F.interpolate(images, size=sides(image_size), mode="bilinear", align_corners=False)
    return DataSource(
        train=TensorDataset(images[train], labels[train]),
        held_out=TensorDataset(images[held_out], labels[held_out]),
        num_classes=10,
        in_chans=1,
    )


class SyntheticImages(Dataset):
    """Noise around a brightness that depends on the label; each image is made when it is asked for."""

    def __init__(self, split: int, samples: int, image_size: int | Sequence[int]) -> None:
        self._split = split
        self._samples = samples
        self._sides = sides(image_size)

    def __len__(self) -> int:
        return self._samples

    @property
    def labels(self) -> np.ndarray:
        """Of all images, (N,)."""
        return np.arange(self._samples) % SYNTHETIC_CLASSES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % SYNTHETIC_CLASSES
        generator = torch.Generator().manual_seed(derive_seed(self._split, index))
        noise = torch.randn(3, *self._sides, generator=generator)
        return noise + (label - (SYNTHETIC_CLASSES - 1) / 2) / SYNTHETIC_CLASSES, label


def build_synthetic(image_size: int | Sequence[int], samples: int) -> DataSource:
    """Random images with learnable labels, for trying a configuration or a machine; the splits differ."""
    return DataSource(
        train=SyntheticImages(0, samples, image_size),
        held_out=SyntheticImages(1, samples, image_size),
        num_classes=SYNTHETIC_CLASSES,
        in_chans=3,
    )
