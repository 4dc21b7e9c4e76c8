"""The results file of a study: a line of JSON for each finished run, so that it goes on over sittings and machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from engine import atomic
from engine.config import Config, marked
from engine.config_file import differences
from engine.config_rules import MAY_CHANGE
from engine.data.source import build_source
from engine.errors import InputError, first_line, writing_errors
from engine.text import to_json, with_nan
from engine.writers import Record
from tools.comparison.runs import METRICS, OWN_KEYS, Run
from tools.machine import machine

DRAWN = ("epoch", "main_loss", "sub_loss", "main_grad_norm", "sub_grad_norm", *METRICS)  # of a run's records
DIGITS = 5  # significant ones of what is drawn


@dataclass(frozen=True)
class Result:
    """A finished run, as a line has it.

    Attributes:
        run: the name of its folder.
        machine: where it was trained, by which versions.
        training_images: how many there were.
        settings: keys of its configuration whose values are not the defaults, but for what changes no result.
        summary: its summary.json.
        records: its metrics.jsonl, as far as pictures show it.
    """

    run: str
    machine: str
    training_images: int
    settings: dict[str, Any]
    summary: Record
    records: list[Record]

    def as_run(self, config: Config) -> Run:
        """The run, whose configuration is the planned one."""
        return Run(Path(self.run), config, self.summary, self.records, self.machine, self.training_images)


def settings(config: Config) -> dict[str, Any]:
    """Keys whose values are not the defaults, but for seed and folder, and what may change on resuming."""
    left_out = (*OWN_KEYS, *marked(MAY_CHANGE))
    return {
        key: value
        for key, (value, _) in differences(config, Config()).items()
        if not any(fnmatch(key, pattern) for pattern in left_out)
    }


def this_machine() -> str:
    """The machine, in one line."""
    return "{device}, {cores} cores, torch {torch}, timm {timm}".format(**machine(torch.cuda.is_available()))


def result_of(run: Run, planned: Config) -> Result:
    """A run that was finished here."""
    records = [{key: float(f"{line[key]:.{DIGITS}g}") for key in DRAWN if key in line} for line in run.records]
    images = len(build_source(planned).train)
    return Result(run.path.name, this_machine(), images, settings(planned), run.summary, records)


def read_results(file: Path) -> list[Result]:
    """The lines of a results file; none if there is no file.

    Raises:
        InputError: a line is none of a result.
    """
    results = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), start=1):
        try:
            result = Result(**json.loads(line))
            results.append(Result(**{**vars(result), "summary": with_nan(result.summary)}))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}, line {number}: {first_line(error)}") from error
    return results


def add_result(file: Path, result: Result) -> None:
    """Write one more line; whatever happens, the file is the old or the new one."""
    before = file.read_text() if file.exists() else ""
    with writing_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, f"{before}{to_json(asdict(result))}\n")


def chosen_machines(results: Sequence[Result], groups: Mapping[str, Hashable]) -> dict[Hashable, str]:
    """By group of runs that are compared the machine that has most of them: runs of two are never compared.

    Args:
        groups: of the runs, by name.
    """
    counts = Counter((groups[result.run], result.machine) for result in results if result.run in groups)
    best: dict[Hashable, str] = {}
    for (group, name), count in counts.items():
        if group not in best or count > counts[group, best[group]]:
            best[group] = name
    return best
