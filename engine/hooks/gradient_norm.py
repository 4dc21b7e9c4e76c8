"""Watches the gradient: its norm for the log, and whether a sub-model's drowns the main model's."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from engine.train_loop import HookBase

LOGGER = logging.getLogger("engine")
TOO_MANY = 100  # times the main model's: a sub-model's gradient is otherwise below it, as its target is close


class GradientNorm(HookBase):
    """Records `grad_norm`, the global L2 norm before clipping, of the steps that are logged.

    At these and at the first step it also compares the branches, and warns once of each sub-model whose weighted
    gradient has more than `TOO_MANY` times the norm of the main model's. FSDP2 shows the gradient of the last branch
    only: nothing can be compared there.

    Args:
        period: iterations between records.
    """

    def __init__(self, period: int) -> None:
        self._period = period
        self._warned: set[int] = set()  # numbers of sub-models

    def before_train(self) -> None:
        self._first = self.trainer.iteration + 1

    def before_step(self) -> None:
        upcoming = self.trainer.iteration + 1
        self._is_due = upcoming % self._period == 0 or upcoming == self._first
        self._norms: list[Tensor] = []  # of all that is accumulated, after each backward of this step
        self._scale = self.trainer.precision.scaler.get_scale() if self._is_due else 1.0

    def after_backward(self) -> None:
        if self._is_due:
            parameters = self.trainer.bare_model.parameters()
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._norms.append(norm.to(self.trainer.process.device))  # without gradients, under FSDP2, it is on the CPU

    def after_step(self) -> None:
        if not self._is_due:
            return
        norms = torch.stack(self._norms).tolist()
        self._compare(norms[: 1 + len(self.trainer.objective.sub_models)])
        if self.trainer.iteration % self._period == 0 and math.isfinite(norms[-1]):  # fp16 overflows now and then
            self.trainer.results["grad_norm"] = norms[-1] / self._scale

    def _compare(self, norms: list[float]) -> None:
        """The main model's norm, then that of its sum with each sub-model's, one after the other."""
        main = norms[0]
        for number, (before, after) in enumerate(pairwise(norms)):
            times = (after - before) / main if main else 0
            if times > TOO_MANY and number not in self._warned and self.trainer.process.is_main:
                self._warned.add(number)
                LOGGER.warning(
                    "WARNING: at iteration %d the gradient of sub-model %d, %s, has %.2g times the norm of the main "
                    "model's: it drowns what the labels teach; use another mode or augmentation, or train.clip_norm",
                    self.trainer.iteration,
                    number,
                    self.trainer.objective.sub_models[number].augmentation,
                    times,
                )
