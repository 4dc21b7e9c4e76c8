"""Records as readable lines in the log."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from engine.writers.writer import Record, Writer

LOGGER = logging.getLogger("engine")


class LogWriter(Writer):
    """One line per record, with the time left at the average speed since the start of this process.

    Args:
        iteration, max_iterations: steps already done, and steps of the whole run.
    """

    SHOWN = ("main_loss", "sub_loss", "grad_norm", "top1", "ema_top1")

    def __init__(self, iteration: int, max_iterations: int) -> None:
        self._first, self._last = iteration, max_iterations
        self._started = time.monotonic()

    def write(self, record: Record) -> None:
        values = "  ".join(f"{name} {record[name]:.4g}" for name in self.SHOWN if name in record)
        LOGGER.info(
            "epoch %.4g  iteration %d  %s  lr %.3g  %.4g images/s  %.0f MiB  %s left",
            record["epoch"],
            record["iteration"],
            values,
            record["lr"],
            record["images_per_second"],
            record["memory"],
            tqdm.format_interval(self._seconds_left(record["iteration"])),
        )

    def _seconds_left(self, iteration: int) -> float:
        """Evaluations and checkpoints are part of the speed: there will be more of them."""
        seconds_per_step = (time.monotonic() - self._started) / (iteration - self._first)
        return seconds_per_step * (self._last - iteration)
