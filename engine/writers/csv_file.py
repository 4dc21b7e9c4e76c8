"""metrics.csv: metrics.jsonl as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from engine import atomic
from engine.errors import writing_errors
from engine.writers.json_lines import read_lines
from engine.writers.writer import REMEDY, Record, Writer


class CSVWriter(Writer):
    """A row per record; a value that a record does not have is empty.

    At the start, and when a record brings a new column, the file is made anew from metrics.jsonl: a resumed
    run has every row once, and rows from before know the new columns.

    Args:
        source: the metrics.jsonl, which has a record before it is written here.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self._path = path
        self._source = source
        self._rewrite()

    def write(self, record: Record) -> None:
        if record.keys() <= set(self._columns):
            with writing_errors(self._path, REMEDY), open(self._path, "a", newline="", encoding="utf-8") as file:
                file.write(_rows([record], self._columns))
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        records = read_lines(self._source)
        self._columns = list(dict.fromkeys(name for record in records for name in record))  # as they came
        header = dict(zip(self._columns, self._columns, strict=True))
        with writing_errors(self._path, REMEDY):
            atomic.write_text(self._path, _rows([header, *records], self._columns) if records else "")


def _rows(records: Sequence[Record], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(records)
    return text.getvalue()
