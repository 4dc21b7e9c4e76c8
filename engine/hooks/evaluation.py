"""Accuracy on held-out images during training, and the best of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.train_loop import HookBase


class Evaluation(HookBase):
    """Evaluates every `period` epochs and after the last step.

    Args:
        evaluations: prefix of the metric names (``""``, ``"ema_"``) to what evaluates those weights.
        period: iterations between evaluations.
        metric: the metric of which the best value is kept.
    """

    state_name = "evaluation"

    def __init__(self, evaluations: dict[str, Callable[[], dict[str, float]]], period: int, metric: str) -> None:
        self._evaluations = evaluations
        self._period = period
        self._metric = metric
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    @property
    def is_new_best(self) -> bool:
        """Whether the weights of this very step are the best so far."""
        return self.best.get("iteration") == self.trainer.iteration

    def after_step(self) -> None:
        iteration = self.trainer.iteration
        if iteration % self._period and not self.trainer.is_last:
            return
        self.latest = {
            prefix + name: value for prefix, run in self._evaluations.items() for name, value in run().items()
        }
        self.trainer.results |= self.latest
        if self.latest[self._metric] > self.best.get("value", float("-inf")):
            self.best = {"iteration": iteration, "epoch": self.trainer.epoch, "value": self.latest[self._metric]}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("best", "latest"):
            if not all(isinstance(value, int | float) for value in state[name].values()):
                raise ValueError(f"evaluation.{name} = {state[name]} is more than numbers")
        if state["best"] and not state["best"].keys() >= {"iteration", "epoch", "value"}:
            raise ValueError(f"evaluation.best = {state['best']} is not complete")
        self.best, self.latest = state["best"], state["latest"]
