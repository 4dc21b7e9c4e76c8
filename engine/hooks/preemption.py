"""Leaves in good order when the scheduler wants the machine back."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from engine.distributed import Agreement
from engine.errors import Preempted
from engine.hooks.checkpoint import Checkpoint
from engine.train_loop import HookBase

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM's and Kubernetes' for preemption, and SLURM's --signal=USR1


class Preemption(HookBase):
    """After SIGTERM or SIGUSR1 to any process: all finish the step, save, and raise Preempted.

    With several processes the others learn of it one step later. A second signal is not waited for:
    whoever sends it may kill.
    """

    def __init__(self, saving: Checkpoint) -> None:
        self._saving = saving
        self._received: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def before_train(self) -> None:
        self._anyone = Agreement(self.trainer.process)
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def after_step(self) -> None:
        if self._anyone.ask(self._received is not None) and not self.trainer.is_last:
            self._saving.save()
            self._saving.finish()
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
