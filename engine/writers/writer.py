"""What every writer of records does."""

from __future__ import annotations

from torch import Tensor

Record = dict[str, float]
REMEDY = "; the last checkpoint is still there. Make room or give write access, then continue with --resume"
AXES = ("iteration", "epoch")  # of every record: when its other values were measured


class Writer:
    """Takes the records of a run; each has `iteration`, `epoch`, `lr` and what was measured."""

    def write(self, record: Record) -> None:
        """Write one record."""
        raise NotImplementedError

    def write_images(self, images: dict[str, Tensor]) -> None:
        """Write batches of images (B, 3, H, W) uint8 by their titles, where there is a place for them."""

    def close(self) -> None:
        """Nothing more will come."""
