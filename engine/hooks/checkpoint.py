"""Saves the run: `last`, `best` and a few numbered checkpoints."""

from __future__ import annotations

import time
from typing import Any

from engine import checkpoint
from engine.hooks.evaluation import Evaluation
from engine.hooks.nan_guard import NaNGuard
from engine.run_folder import RunFolder
from engine.train_loop import HookBase


class Checkpoint(HookBase):
    """Saves every `period` iterations, every `every_minutes`, at a new best and after the last step.

    Only the main process writes. The guard is asked first: a state that is not finite is never saved.

    Args:
        facts: plain values saved beside the state, for example the configuration.
        keep: numbered checkpoints that stay.
    """

    def __init__(
        self,
        folder: RunFolder,
        evaluation: Evaluation,
        guard: NaNGuard,
        facts: dict[str, Any],
        period: int,
        every_minutes: float | None,
        keep: int,
    ) -> None:
        self._folder = folder
        self._evaluation = evaluation
        self._guard = guard
        self._facts = facts
        self._period = period
        self._every_seconds = float("inf") if every_minutes is None else 60 * every_minutes
        self._keep = keep

    def before_train(self) -> None:
        self._last_saved = time.monotonic()

    def after_step(self) -> None:
        trainer, is_best = self.trainer, self._evaluation.is_new_best
        on_time = time.monotonic() - self._last_saved >= self._every_seconds
        numbered = trainer.iteration % self._period == 0
        if not (numbered or on_time or is_best or trainer.is_last):
            return
        self._last_saved = time.monotonic()
        self._guard.check()
        if trainer.process.is_main:
            self._save(numbered and self._keep > 0, is_best)

    def _save(self, numbered: bool, is_best: bool) -> None:
        folder = self._folder
        checkpoint.save({**self._facts, **self.trainer.state_dict()}, folder.last)
        if is_best:
            checkpoint.link(folder.last, folder.best)
        if numbered:
            checkpoint.link(folder.last, folder.numbered(self.trainer.iteration))
            for old in folder.list_numbered()[: -self._keep]:
                old.unlink()
