"""A pair of data sets, for training and for evaluation, and what a model must know of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from engine.data.fingerprint import fingerprint


@dataclass
class DataSource:
    """Data sets of (image (C, H, W), label), which may raise UnreadableImage, and the shape of the task.

    Attributes:
        train: None where the source is for evaluation alone.
        num_classes: outputs of the model.
        class_names: by label; their numbers if none are given.
    """

    train: Dataset | None
    held_out: Dataset
    num_classes: int
    in_chans: int
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.class_names = tuple(self.class_names or map(str, range(self.num_classes)))

    def image_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of square images."""
        return self.in_chans, image_size, image_size

    @property
    def left_out(self) -> dict[str, str]:
        """Files in the folders of each split that are no images: `training` to "12 .txt, 3 hidden"."""
        counts = {name: getattr(dataset, "left_out", {}) for name, dataset in self._splits.items()}
        return {
            name: ", ".join(f"{count} {suffix}" for suffix, count in Counter(found).most_common())
            for name, found in counts.items()
            if found
        }

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


# In place of data that is not there, to count and to plan with: it has the size of ImageNet-1k, and no image
IMAGENET = DataSource(train=range(1_281_167), held_out=range(50_000), num_classes=1000, in_chans=3)
