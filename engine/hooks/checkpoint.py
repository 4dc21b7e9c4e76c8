"""Saves the run: `last`, the one before it, `best` and a few numbered checkpoints."""

from __future__ import annotations

import time
from typing import Any

from engine.checkpoint.store import CheckpointStore
from engine.distributed import Agreement
from engine.hooks.evaluation import Evaluation
from engine.hooks.nan_guard import NaNGuard
from engine.train_loop import HookBase


class Checkpoint(HookBase):
    """Saves every `period` iterations, every `every_minutes`, at a new best and after the last step.

    The guard is asked first: a state that is not finite is never saved.

    Args:
        facts: plain values saved beside the state, for example the configuration.
        every_minutes: by the main process's clock; None does not look at it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        evaluation: Evaluation,
        guard: NaNGuard,
        facts: dict[str, Any],
        period: int,
        every_minutes: float | None,
    ) -> None:
        self._store = store
        self._evaluation = evaluation
        self._guard = guard
        self._facts = facts
        self._period = period
        self._every_minutes = every_minutes
        self._saved_iteration: int | None = None

    def before_train(self) -> None:
        self._last_saved = time.monotonic()
        self._is_asked_for = False  # by the clock, since the last save
        self._anyone = Agreement(self.trainer.process)

    def after_step(self) -> None:
        self._store.check()
        is_numbered = self.trainer.iteration % self._period == 0
        is_due = is_numbered or self._evaluation.is_new_best or self.trainer.is_last
        on_time = self._every_minutes is not None and self._anyone.ask(not is_due and self._is_time())
        if is_due or on_time:
            self.save(is_numbered)

    def save(self, is_numbered: bool = False) -> None:
        """Save the state after this step, unless that is done. All processes call it together."""
        if self._saved_iteration == self.trainer.iteration:
            return
        self._guard.check()
        self._guard.check_weights()
        self._store.save({**self._facts, **self.trainer.state_dict()}, self._evaluation.is_new_best, is_numbered)
        self._last_saved, self._saved_iteration = time.monotonic(), self.trainer.iteration
        self._is_asked_for = False

    def after_train(self) -> None:
        self.finish()

    def finish(self) -> None:
        """Wait until everything is on the disk, and no question is open. All processes call it together."""
        self._store.wait()
        self._anyone.finish()

    def close(self) -> None:
        self._store.wait()

    def _is_time(self) -> bool:
        """Once for each save: the answer may come a step later."""
        if self._is_asked_for or not self.trainer.process.is_main:
            return False
        self._is_asked_for = time.monotonic() - self._last_saved >= 60 * self._every_minutes
        return self._is_asked_for
