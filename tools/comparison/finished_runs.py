"""What finished runs left in their folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config
from engine.config_file import load_config
from engine.errors import InputError
from engine.json_text import with_nan
from engine.run_folder import RunFolder
from engine.writers import Record, read_lines


@dataclass(frozen=True)
class FinishedRun:
    """A run that reached its end.

    Attributes:
        summary: what summary.json holds: the last evaluation, the last losses, seconds …
        records: the lines of metrics.jsonl.
    """

    path: Path
    config: Config
    summary: Record
    records: list[Record]

    def value(self, name: str) -> float:
        """One of the summary's values.

        Raises:
            InputError: the run did not measure it.
        """
        if name not in self.summary:
            raise InputError(f"{self.path}: has no {name}; its summary.json has {', '.join(self.summary)}")
        return self.summary[name]


def read_run(path: Path) -> FinishedRun:
    """The run in a folder.

    Raises:
        InputError: no folder, none of a run, or the run is not finished.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if not folder.config.is_file():
        raise InputError(f"{path}: is no folder of a run, it has no {folder.config.name}")
    refuse_if_written(folder)
    reason = why_unfinished(folder)
    if reason is not None:
        raise InputError(f"{path}: the run is not finished, {reason}; continue it with --resume")
    return FinishedRun(path, load_config(folder.config), _read_summary(folder), read_lines(folder.metrics))


def refuse_if_written(folder: RunFolder) -> None:
    """Raise InputError if a process is writing into the folder."""
    writer = folder.writer()
    if writer is not None:
        raise InputError(f"{folder.path}: a run is still writing into it ({writer})")


def why_unfinished(folder: RunFolder) -> str | None:
    """Why the run in a folder is not at its end, None if it is; a run that was continued outgrows its summary."""
    if not folder.summary.exists():
        return f"{folder.summary.name} is missing"
    records = read_lines(folder.metrics)
    last = records[-1]["iteration"] if records else 0
    iterations = _read_summary(folder)["iterations"]
    if last != iterations:
        return f"{folder.summary.name} is of iteration {iterations}, {folder.metrics.name} ends at {last}"
    return None


def _read_summary(folder: RunFolder) -> Record:
    try:
        summary = json.loads(folder.summary.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder.summary}: cannot be read: {error}") from error
    if not isinstance(summary, dict) or "iterations" not in summary:
        raise InputError(f"{folder.summary}: is no summary of a run")
    return with_nan(summary)
