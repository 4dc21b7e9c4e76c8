"""A progress bar in a terminal."""

from __future__ import annotations

from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.train_loop import HookBase


class ProgressBar(HookBase):
    """Shows steps, time left and speed; nothing where standard error is no terminal."""

    def before_train(self) -> None:
        trainer = self.trainer
        self._stack = ExitStack()
        self._stack.enter_context(logging_redirect_tqdm())
        self._bar = self._stack.enter_context(
            tqdm(total=trainer.max_iterations, initial=trainer.iteration, unit="it", disable=None, leave=False)
        )

    def after_step(self) -> None:
        self._bar.update()

    def close(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()
