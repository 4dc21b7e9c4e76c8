"""Where the records of a run go: log lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from engine.errors import RunError

LOGGER = logging.getLogger("engine")
Record = dict[str, float]


class Writer(Protocol):
    """Takes the records of a run; each has `iteration`, `epoch`, `lr` and what was measured."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def close(self) -> None:
        """Nothing more will come."""


class LogWriter:
    """One readable line per record in the log."""

    SHOWN = ("main_loss", "sub_loss", "top1", "ema_top1")

    def write(self, record: Record) -> None:
        values = "  ".join(f"{name} {record[name]:.4g}" for name in self.SHOWN if name in record)
        LOGGER.info(
            "epoch %.4g  iteration %d  %s  lr %.3g  %.4g images/s",
            record["epoch"],
            record["iteration"],
            values,
            record["lr"],
            record["images_per_second"],
        )

    def close(self) -> None:
        pass


class JSONLinesWriter:
    """One JSON object per line, on the disk before the next step.

    Lines after `iteration` are cut off first: a resumed run writes them again. So is what an interrupted
    write left of a line.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._path = path
        with self._reported():
            self._file = open(path, "ab")  # noqa: SIM115  (closed in close)
            self._file.truncate(_size_up_to(path, iteration))

    def write(self, record: Record) -> None:
        with self._reported():
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint must not survive a power failure that its records do not

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written: {error.strerror}; the last checkpoint is still there. "
                "Make room or give write access, then continue with --resume"
            ) from error


class TensorBoardWriter:
    """TensorBoard events; what an interrupted run wrote after `iteration` is hidden."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed on one process only

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in ("iteration", "epoch"):
                self._writer.add_scalar(name, value, record["iteration"])

    def close(self) -> None:
        self._writer.close()


def read_lines(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; a half-written last line is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _size_up_to(path: Path, iteration: int) -> int:
    """Bytes of the whole lines of records up to `iteration`."""
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            is_wanted = line.endswith(b"\n") and json.loads(line)["iteration"] <= iteration
        except (ValueError, KeyError, TypeError):
            break
        if not is_wanted:
            break
        size += len(line)
    return size
