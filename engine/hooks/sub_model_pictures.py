"""Pictures of what main model and sub-models see, beside the curves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.hooks.writers import WriteRecords
from engine.train_loop import HookBase

SHOWN = 8  # images


class SubModelPictures(HookBase):
    """Hands pictures of a few held-out images to the writers, before the first step of a run.

    Args:
        draw: pictures (B, 3, H, W) uint8 by title, from images (B, C, H, W).
        writing: has the writers.
    """

    def __init__(self, draw: Callable[[Tensor], dict[str, Tensor]], writing: WriteRecords) -> None:
        self._draw = draw
        self._writing = writing

    def before_train(self) -> None:
        if self.trainer.iteration == 0:
            self._writing.write_images(self._draw(self.trainer.data.held_out.examples(SHOWN)))
