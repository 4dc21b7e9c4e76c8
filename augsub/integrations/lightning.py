"""MaskSub in a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from augsub.objective import Objective, ObjectiveOutput

if TYPE_CHECKING:
    from lightning import LightningModule as _Base
else:
    _Base = object  # importing this module needs no Lightning, and both of its names for itself will do


class SubModelMixin(_Base):
    """The training step of a LightningModule: ``class Mine(SubModelMixin, LightningModule)``.

    With automatic optimisation both branches are in one graph, and Lightning calls backward. With
    ``self.automatic_optimization = False`` backward runs branch by branch, one graph at a time, and then the
    optimiser steps; clipping, schedules and accumulation are then the module's own, as always there.

    Attributes:
        model: a patched model.
        objective: the objective.
    """

    model: nn.Module
    objective: Objective

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch: images (B, C, H, W), and labels (B,) or soft labels (B, K)."""
        self.objective.epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
        out = self.objective(self.model, *batch) if self.automatic_optimization else self.branchwise_step(*batch)
        self.log("main_loss", out.main_loss)
        for number, loss in enumerate(out.sub_losses):
            self.log(f"sub_loss_{number}", loss)
        return out.loss

    def branchwise_step(self, images: Tensor, targets: Tensor) -> ObjectiveOutput:
        """Backward of every branch, then a step of the one optimiser.

        Args:
            images: (B, C, H, W).
            targets: labels (B,) or soft labels (B, K).

        Raises:
            ValueError: if the module has several optimisers.
        """
        optimizer = self.optimizers()
        if isinstance(optimizer, list):
            raise ValueError(
                f"{type(self).__name__} has {len(optimizer)} optimisers, SubModelMixin steps one: "
                "call self.objective.backward in a training_step of your own"
            )
        optimizer.zero_grad()
        model = _WithSync(self.model, self.trainer.strategy.model)
        out = self.objective.backward(cast(nn.Module, model), images, targets, backward=self.manual_backward)
        optimizer.step()
        return out


class _WithSync:
    """The model, with the `no_sync` of the wrapper that Lightning put around the whole module."""

    def __init__(self, model: nn.Module, wrapper: nn.Module | None) -> None:
        self.model = model
        self.no_sync: Callable[[], AbstractContextManager[None]] = getattr(wrapper, "no_sync", nullcontext)

    def __call__(self, images: Tensor, **augsub: Any) -> Tensor:
        logits: Tensor = self.model(images, **augsub)
        return logits
