"""A hook for studies: how much main model and sub-model pull at the weights, over the training."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.hooks import HOOK_REGISTRY
from engine.train_loop import HookBase


@HOOK_REGISTRY.register()
class BranchGradients(HookBase):
    """Records `main_grad_norm` and `sub_grad_norm`, of a step's first micro-batch, each of the unweighted loss.

    At its steps it keeps the gradients of two branches beside each other: twice their memory. Nothing is recorded of
    further sub-models, nor where branches have no backward of their own, as in CoSub. FSDP2 shows the gradient of the
    last branch only.

    Args:
        period: iterations between records.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def before_step(self) -> None:
        self._is_due = (self.trainer.iteration + 1) % self.period == 0
        self._after: list[list[Tensor]] = []  # gradients after the first branch, and after the second

    def after_backward(self) -> None:
        if self._is_due and len(self._after) < 2:
            weights = self.trainer.bare_model.parameters()
            self._after.append([torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights])

    def after_step(self) -> None:
        if not self._is_due or not self.trainer.objective.branch_by_branch:
            return
        objective, scale = self.trainer.objective, self.trainer.precision.scaler.get_scale()
        branches = [("main", objective.main_weight)] if objective.computes_main else []
        branches += [("sub", sub_model.weight_at(objective.epoch)) for sub_model in objective.sub_models[:1]]
        before: list[Tensor] | None = None
        for (name, weight), after in zip(branches, self._after, strict=False):
            own = after if before is None else torch._foreach_sub(after, before)
            norm = torch.stack(torch._foreach_norm(own)).norm()
            if weight:
                factor = self.trainer.data.accumulation / scale / weight
                self.trainer.results[f"{name}_grad_norm"] = float(norm) * factor
            before = after
