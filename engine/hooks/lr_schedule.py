"""The learning rate of each step."""

from __future__ import annotations

from timm.scheduler.scheduler import Scheduler

from engine.train_loop import HookBase


class LearningRateSchedule(HookBase):
    """Sets the learning rate as a function of the iteration or the epoch; there is nothing to resume."""

    def __init__(self, schedule: Scheduler) -> None:
        self._schedule = schedule

    def before_step(self) -> None:
        self._schedule.step(int(self.trainer.epoch))
        self._schedule.step_update(self.trainer.iteration)
