"""MaskSub in a LightningModule, with automatic and with manual optimisation.

python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import torch
from digits import DIGITS, EPOCHS, accuracy, adamw, batches, masksub, small_vit
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import Dataset

import augsub
from augsub.integrations.lightning import SubModelMixin


class Classifier(SubModelMixin, LightningModule):
    """A patched model and its objective; the training step is the mixin's.

    Args:
        manual: call backward branch by branch: one graph at a time in memory.
    """

    def __init__(self, model: nn.Module, objective: augsub.Objective, manual: bool = False) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.automatic_optimization = not manual
        objective.prepare(model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model)


def train(
    model: nn.Module,
    objective: augsub.Objective,
    dataset: Dataset,
    epochs: int,
    shuffle: bool = True,
    manual: bool = False,
    **trainer: Any,
) -> None:
    """Train a patched model."""
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=epochs, logger=False, **settings, **trainer).fit(
        Classifier(model, objective, manual), batches(dataset, shuffle)
    )


def main() -> None:
    """Train on digits both ways, print the accuracies."""
    for manual in (False, True):
        seed_everything(0, verbose=False)
        model = augsub.patch(small_vit())
        train(model, masksub(), DIGITS.train, EPOCHS, manual=manual)
        figure = accuracy(augsub.unpatch(model).cpu().eval())
        print(f"Lightning, {'manual' if manual else 'automatic'}: {figure:.2f} % of the held-out digits")


if __name__ == "__main__":
    main()
