"""metrics.jsonl: the records of a run, of which other files are made."""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.errors import writing_errors
from engine.json_text import to_json, with_nan
from engine.writers.writer import REMEDY, Record, Writer


class JSONLinesWriter(Writer):
    """One JSON object per line, on the disk before the next step.

    Lines after `iteration` are cut off first: a resumed run writes them again. So is what an interrupted
    write left of a line.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._path = path
        with writing_errors(path, REMEDY):
            self._file = open(path, "ab")  # noqa: SIM115  (closed in close)
            self._file.truncate(_size_up_to(path, iteration))

    def write(self, record: Record) -> None:
        with writing_errors(self._path, REMEDY):
            self._file.write(f"{to_json(record)}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint must not survive a power failure that its records do not

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; a half-written last line is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(with_nan(json.loads(line)))
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
