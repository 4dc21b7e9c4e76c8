"""The learning rate of each step."""

from __future__ import annotations

from collections.abc import Callable

from engine.train_loop import HookBase


class LearningRateSchedule(HookBase):
    """Sets the learning rate as a function of the iteration or the epoch; there is nothing to resume.

    Args:
        schedule: learning rate of a step.
        per_epoch: whether a step is an epoch; otherwise it is an iteration.
    """

    def __init__(self, schedule: Callable[[int], float], per_epoch: bool) -> None:
        self._schedule = schedule
        self._per_epoch = per_epoch

    def before_step(self) -> None:
        step = int(self.trainer.epoch) if self._per_epoch else self.trainer.iteration
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self._schedule(step) * group["lr_scale"]
