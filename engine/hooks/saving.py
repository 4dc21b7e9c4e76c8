"""Hooks that save the run: at their time, and when the machine is wanted back."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from engine.checkpoint import CheckpointStore
from engine.distributed import Agreement
from engine.errors import Preempted
from engine.hooks.reporting import Evaluation
from engine.hooks.training import NaNGuard
from engine.train_loop import HookBase


@dataclass
class Checkpoint(HookBase):
    """Saves every `period` iterations, every `every_minutes`, at a new best and after the last step.

    The guard is asked first: a state that is not finite is never saved.
    """

    store: CheckpointStore
    evaluation: Evaluation
    guard: NaNGuard
    facts: dict[str, Any]  # plain values saved beside the state, for example the configuration
    period: int
    every_minutes: float | None  # by the main process's clock; None does not look at it

    def before_train(self) -> None:
        self._saved_iteration: int | None = None
        self._last_saved = time.monotonic()
        self._anyone = Agreement(self.trainer.process)

    def after_step(self) -> None:
        self.store.check()
        is_numbered = self.trainer.iteration % self.period == 0
        is_due = is_numbered or self.evaluation.is_new_best or self.trainer.is_last
        on_time = self.every_minutes is not None and self._anyone.ask(not is_due and self._is_time())
        if is_due or on_time:
            self.save(is_numbered)

    def save(self, is_numbered: bool = False) -> None:
        """Save the state after this step, unless that is done. All processes call it together."""
        if self._saved_iteration == self.trainer.iteration:
            return
        self.guard.check()
        self.guard.check_weights()
        self.store.save({**self.facts, **self.trainer.state_dict()}, self.evaluation.is_new_best, is_numbered)
        self._last_saved, self._saved_iteration = time.monotonic(), self.trainer.iteration

    def after_train(self) -> None:
        self.finish()

    def finish(self) -> None:
        """Wait until everything is on the disk, and no question is open. All processes call it together."""
        self.store.wait()
        self._anyone.finish()

    def close(self) -> None:
        self.store.wait()

    def _is_time(self) -> bool:
        """Whether the main process's clock asks, once for each save: the answer may come a step later."""
        now = time.monotonic()
        if not self.trainer.process.is_main or now - self._last_saved < 60 * self.every_minutes:
            return False
        self._last_saved = now
        return True


@dataclass
class Preemption(HookBase):
    """After SIGTERM or SIGUSR1 to any process: all finish the step, save, and raise Preempted.

    With several processes the others learn of it one step later. A second signal is not waited for:
    whoever sends it may kill.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM's and Kubernetes' for preemption, and SLURM's --signal=USR1

    saving: Checkpoint

    def __post_init__(self) -> None:
        self._received: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def before_train(self) -> None:
        self._anyone = Agreement(self.trainer.process)
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def after_step(self) -> None:
        if self._anyone.ask(self._received is not None) and not self.trainer.is_last:
            self.saving.save()
            self.saving.finish()
            self._anyone.finish()
            cause = "another process's signal" if self._received is None else signal.Signals(self._received).name
            raise Preempted(f"stopped by {cause} after iteration {self.trainer.iteration}; the state is saved")

    def after_train(self) -> None:
        self._anyone.finish()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
