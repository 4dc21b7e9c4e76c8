"""The held-out images of one process."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from engine.data.bad_files import BadFile, UnreadableImage

IGNORED = -1  # label of what is no image: it fills a share, or stands for a file that cannot be read


class HeldOutShare(Dataset):
    """Images rank, rank + world_size, … of a data set, filled up so that all shares are equally long.

    Every process thus makes the same number of forwards, and each image is in one share only.

    Args:
        blank: stands for what is no image, (C, H, W).
    """

    def __init__(self, dataset: Dataset, rank: int, world_size: int, blank: Tensor) -> None:
        self._dataset = dataset
        self._rank = rank
        self._world_size = world_size
        self._blank = blank

    def __len__(self) -> int:
        return math.ceil(len(self._dataset) / self._world_size)

    def __getitems__(self, positions: list[int]) -> list[Any]:
        """Pairs (image, label) in the order of `positions`, and after them the bad files among these."""
        bad_files: list[BadFile] = []
        return [self._item(position, bad_files) for position in positions] + bad_files

    def _item(self, position: int, bad_files: list[BadFile]) -> tuple[Any, int]:
        index = self._rank + position * self._world_size
        if index < len(self._dataset):
            try:
                image, label = self._dataset[index]
                return image, int(label)
            except UnreadableImage as error:
                bad_files.append(error.bad_file)
        return self._blank, IGNORED
