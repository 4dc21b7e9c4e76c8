"""One count of bad files for all processes, in the checkpoints too."""

from __future__ import annotations

from typing import Any

from engine.data.loaders import BadFiles
from engine.train_loop import HookBase


class UniteBadFiles(HookBase):
    """Brings together what the processes found, every `period` iterations and after the last step.

    A checkpoint in between holds what the main process knows; the others' files are found again.
    """

    state_name = "bad_files"

    def __init__(self, bad_files: BadFiles, period: int) -> None:
        self._bad_files = bad_files
        self._period = period

    def after_step(self) -> None:
        if self.trainer.iteration % self._period == 0 or self.trainer.is_last:
            self._bad_files.unite(self.trainer.process)

    def state_dict(self) -> dict[str, Any]:
        return self._bad_files.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bad_files.load_state_dict(state)
