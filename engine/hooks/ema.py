"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from timm.utils import ModelEmaV3

from engine.train_loop import HookBase


class ExponentialMovingAverage(HookBase):
    """Updates timm's ModelEmaV3 after every step."""

    state_name = "ema"

    def __init__(self, ema: ModelEmaV3) -> None:
        self._ema = ema

    def after_step(self) -> None:
        self._ema.update(self.trainer.bare_model, step=self.trainer.iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self._ema.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ema.module.load_state_dict(state["model"])

    def start_late(self) -> None:
        self._ema.set(self.trainer.bare_model)  # not from random weights
