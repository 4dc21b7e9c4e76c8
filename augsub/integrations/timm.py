"""MaskSub as a task of timm's own training loop (timm >= 1.0.24)."""

from __future__ import annotations

from typing import Any

from timm.task import ClassificationTask
from torch import Tensor, nn

from augsub.objective import Objective
from augsub.patching import is_patched, patch


class SubModelTask(ClassificationTask):
    """A `timm.task.TrainingTask` whose loss is MaskSub's.

    Moving averages, compilation, DistributedDataParallel, gradient accumulation and checkpoints are timm's
    own. Both branches are in one graph, since timm's loop calls backward: their activations exist together.

    Args:
        model: a timm model, not wrapped; patched here if it is not yet.
        objective: the objective, with the criterion of the recipe. timm's loop tells no task which epoch it is: with an
            :class:`augsub.Ramp` set ``task.objective.epoch`` at its beginning.
        **options: those of every task: device, dtype, verbose.

    Raises:
        ValueError: if the model is wrapped already, or has no site for a sub-model.
    """

    def __init__(self, model: nn.Module, objective: Objective, **options: Any) -> None:
        if not is_patched(model):
            patch(model)
        objective.prepare(model)
        super().__init__(model, objective.criterion, **options)
        self.objective = objective

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Losses and logits of one micro-batch.

        Args:
            input: images, (B, C, H, W).
            target: labels (B,) or soft labels (B, K).

        Returns:
            `loss`, to be backpropagated; `output`, logits (B, K) of the main model; `main_loss` and
            `sub_losses`, unweighted.
        """
        out = self.objective(self.trainable_module, input, target)
        return {"loss": out.loss, "output": out.logits, "main_loss": out.main_loss, "sub_losses": out.sub_losses}
