"""Hands the averages since the last record, and what other hooks found out, to the writers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from engine.memory import peak_memory
from engine.train_loop import HookBase
from engine.writers import Record, Writer


class WriteRecords(HookBase):
    """Writes a record every `period` iterations, and whenever there are results of an evaluation.

    Attributes:
        latest: the newest record, in every process; None before the first one.

    Args:
        open_writers: makes the writers at the start of training, given the iterations already done.
        period: iterations between records.
        global_batch: images per iteration, for the throughput.
    """

    def __init__(self, open_writers: Callable[[int], Sequence[Writer]], period: int, global_batch: int) -> None:
        self._open_writers = open_writers
        self._period = period
        self._global_batch = global_batch
        self._writers: Sequence[Writer] = ()
        self.latest: Record | None = None

    def before_train(self) -> None:
        self._writers = self._open_writers(self.trainer.iteration)
        self._start_interval()

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.iteration % self._period and not trainer.is_last and not trainer.results:
            return
        means = trainer.means.read()
        seconds = time.perf_counter() - self._since
        self.latest = {
            "iteration": trainer.iteration,
            "epoch": trainer.epoch,
            "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
            **means,
            "images_per_second": self._global_batch * (trainer.iteration - self._first_iteration) / seconds,
            "memory": peak_memory(trainer.process.device),
            **trainer.results,
        }
        for writer in self._writers:
            writer.write(self.latest)
        self._start_interval()

    def write_images(self, images: dict[str, Tensor]) -> None:
        """Hand batches of images (B, 3, H, W) uint8, by their titles, to the writers."""
        for writer in self._writers:
            writer.write_images(images)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def _start_interval(self) -> None:
        self._since = time.perf_counter()
        self._first_iteration = self.trainer.iteration
