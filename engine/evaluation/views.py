"""Other models behind the same weights, as modules that give logits for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed import Process
from engine.seeding import derive_seed, seed_all


class AmongClasses(nn.Module):
    """A model that chooses among some of its classes.

    Args:
        model: of logits (B, K).
        classes: numbers of C of them; the logits (B, C) have their order.
    """

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.classes = list(classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, torch.tensor(self.classes, device=images.device)]


class SubModelView(nn.Module):
    """The sub-model of a patched model under an augmentation, for one pass over the images.

    What it draws follows from the seed, the process and the number of the batch: the same command gives the same
    figures, another `evaluation.batch` or number of processes other draws.
    """

    def __init__(self, model: nn.Module, augmentation: Any, seed: int, process: Process) -> None:
        super().__init__()
        self.model = model
        self.augmentation = augmentation
        self._key = (seed, process.rank)
        self._batches = 0

    def forward(self, images: Tensor) -> Tensor:
        seed_all(derive_seed(*self._key, self._batches))
        self._batches += 1
        return self.model(images, augsub=self.augmentation)
