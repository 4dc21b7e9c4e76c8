"""The last epochs of a run without Mixup and CutMix."""

from __future__ import annotations

from timm.data import Mixup

from engine.train_loop import HookBase


class StopMixing(HookBase):
    """From `epoch` on the labels are still smoothed, but nothing is mixed."""

    def __init__(self, mixup: Mixup, epoch: int) -> None:
        self._mixup = mixup
        self._epoch = epoch

    def before_step(self) -> None:
        self._mixup.mixup_enabled = self.trainer.epoch < self._epoch
