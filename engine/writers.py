"""Where the records of a run go: log lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Protocol

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
    """One JSON object per line. Lines after `iteration` are cut off first: a resumed run writes them again."""

    def __init__(self, path: Path, iteration: int) -> None:
        kept = [line for line in read_lines(path) if line["iteration"] <= iteration]
        self._file = open(path, "w", buffering=1)  # noqa: SIM115  (closed in close)
        for record in kept:
            self.write(record)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


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
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
