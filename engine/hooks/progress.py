"""A progress bar in a terminal."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.hooks.writers import WriteRecords
from engine.train_loop import HookBase
from engine.writers import Record

LAYOUT = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # and what a record says, in 80 columns


class ProgressBar(HookBase):
    """Shows steps and time left, and what the latest record says; nothing where standard error is no terminal.

    Args:
        writing: has the records; their values are on the CPU already, so that no step waits for the device.
    """

    def __init__(self, writing: WriteRecords) -> None:
        self._writing = writing
        self._shown: Record | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        columns, lines = shutil.get_terminal_size()  # 80 x 24 where a terminal tells no size; tqdm would show nothing
        self._stack = ExitStack()
        self._stack.enter_context(logging_redirect_tqdm())
        self._bar = self._stack.enter_context(
            tqdm(
                total=trainer.max_iterations,
                initial=trainer.iteration,
                bar_format=LAYOUT,
                smoothing=0,  # time left at the average speed: pauses for evaluation are part of it
                disable=None,
                leave=False,
                ncols=columns - 1,
                nrows=lines,
            )
        )

    def after_step(self) -> None:
        latest = self._writing.latest
        if latest is not self._shown:
            self._shown = latest
            self._bar.set_postfix_str(_in_short(latest), refresh=False)
        self._bar.update()

    def close(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()


def _in_short(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}, lr {record['lr']:.2g}, {record['images_per_second']:.0f} images/s, "
        f"{record['memory']:.0f} MiB"
    )
