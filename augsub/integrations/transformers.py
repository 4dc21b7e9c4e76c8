"""MaskSub in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from augsub.objective import Objective


class SubModelTrainer(Trainer):
    """A Trainer whose training loss is MaskSub's. Evaluation is the model's own.

    The model's backbone must be patched: ``augsub.patch(model.base_model)``, which is the timm model of a
    `TimmWrapperForImageClassification`, and the part below the head of ViT, DeiT, DINOv2 and others. The
    model itself stays one of Transformers, with its signature, class name and saving.

    Args:
        *args: those of Trainer.
        objective: the objective; its criterion replaces the loss that the model itself would compute.
        **kwargs: those of Trainer.

    Raises:
        ValueError: if no part of the model is patched, or it has no site for a sub-model.
    """

    loss_is_scaled_for_ga = False  # a mean of the micro-batch: Trainer divides it by the accumulation

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # what earlier versions ask instead
        self.objective: Objective = objective
        objective.prepare(self.model)  # type: ignore[arg-type]  # it has one by now

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch: `pixel_values`, images (B, C, H, W), and `labels`, (B,) or soft (B, K)."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        self.objective.epoch = self.state.epoch or 0.0  # None before the first step
        out = self.objective(model, inputs["pixel_values"], inputs["labels"])
        return (out.loss, {"logits": out.logits}) if return_outputs else out.loss
