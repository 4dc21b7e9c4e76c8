"""Finished runs, which of them belong together, and what a way of training gains over the baseline, seed by seed."""

from __future__ import annotations

import glob
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from scipy import stats

from engine.config import Config
from engine.config_file import leaves, load_config
from engine.errors import InputError
from engine.run_folder import RunFolder
from engine.text import expanded, with_nan
from engine.typed_yaml import Dumper
from engine.writers import Record, read_lines

CONFIDENCE = 0.95
SAME_IMAGES = ("data.dataset", "data.eval_split")  # what runs must share to be measured on the same images
OWN_KEYS = ("seed", "output_dir")  # what the runs of one way may differ in


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


@dataclass(frozen=True)
class Way:
    """Runs of one configuration, by seed.

    Attributes:
        flops: multiply-adds of all forwards of one run, if somebody counted them.
    """

    name: str
    runs: dict[int, FinishedRun]
    flops: float | None = None

    def values(self, metric: str) -> list[float]:
        """One value per seed."""
        return [run.value(metric) for run in self.runs.values()]

    @property
    def first(self) -> FinishedRun:
        """Any run, where all are alike."""
        return next(iter(self.runs.values()))


@dataclass
class Group:
    """Runs that belong together; `name` is empty where the user gave none."""

    name: str
    runs: list[FinishedRun]


def read_ways(arguments: Sequence[str]) -> list[Way]:
    """Ways of training, in the order in which they are first mentioned.

    Args:
        arguments: folders, and `name=folder,folder` for runs that make one way whatever their configurations;
            a folder may have wildcards.

    Raises:
        InputError: a folder without a finished run, a name or a seed that comes twice.
    """
    groups: list[Group] = []
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        if equals and not Path(argument).exists():
            groups.append(Group(name, [run for folder in folders.split(",") for run in _read_runs(folder)]))
        else:
            for run in _read_runs(argument):
                _add(run, groups)
    _name([group for group in groups if not group.name])
    for name, count in Counter(group.name for group in groups).items():
        if count > 1:
            raise InputError(
                f"{name}: {count} ways have this name; give all folders of one at once: NAME=FOLDER,FOLDER"
            )
    return [make_way(group.name, group.runs) for group in groups]


def make_way(name: str, runs: Sequence[FinishedRun]) -> Way:
    """Runs by seed, lowest first."""
    by_seed: dict[int, FinishedRun] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        other = by_seed.setdefault(run.config.seed, run)
        if other is not run:
            raise InputError(f"{name}: two runs of seed {run.config.seed}, {other.path} and {run.path}")
    return Way(name, by_seed)


def override_text(key: str, value: object) -> str:
    """`key=value` as the command line takes it."""
    flow = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"), sort_keys=False)
    return f"{key}={flow.strip().removesuffix('...').strip()}"  # YAML ends a bare value with a line of dots


def _read_runs(pattern: str) -> list[FinishedRun]:
    path = Path(expanded(pattern))
    matches = [] if path.exists() else sorted(Path(match) for match in glob.glob(str(path)))
    return [read_run(folder) for folder in matches or [path]]


def _add(run: FinishedRun, groups: list[Group]) -> None:
    for group in groups:
        if not group.name and not differing_keys([group.runs[0], run]):
            group.runs.append(run)
            return
    groups.append(Group("", [run]))


def _name(groups: Sequence[Group]) -> None:
    """By what the folders' names have in common; where that does not tell them apart, by the configurations."""
    names = [_common_name(group.runs) for group in groups]
    if "" in names or len(set(names)) < len(names):
        differing = differing_keys([group.runs[0] for group in groups])
        texts = [[override_text(key, value) for value in values] for key, values in differing.items()]
        names = [" ".join(words) for words in zip(*texts, strict=True)] or names
    for group, name in zip(groups, names, strict=True):
        group.name = name or str(group.runs[0].path)


def _common_name(runs: Sequence[FinishedRun]) -> str:
    """`digits_vit` for digits_vit_seed0, digits_vit_seed1 …; empty where that is all the names have."""
    names = {re.sub(rf"(^|[_-])(seed[_-]?)?{run.config.seed}$", "", run.path.resolve().name) for run in runs}
    return names.pop() if len(names) == 1 else ""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its standard error; one seed has none."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of the differences between runs of the same seed.

    Attributes:
        by_seed: way minus baseline; empty where they have no seed in common.
        half_width: of the confidence interval around the mean; one seed has none.
    """

    by_seed: dict[int, float]
    half_width: float | None

    @property
    def mean(self) -> float:
        """Of the differences."""
        return statistics.fmean(self.by_seed.values())

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, else 0."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, the sample's standard deviation over the root of its size."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def paired_difference(way: Way, baseline: Way, metric: str, confidence: float = CONFIDENCE) -> Difference:
    """Student's t interval of the differences over common seeds."""
    common = [seed for seed in way.runs if seed in baseline.runs]
    by_seed = {seed: way.runs[seed].value(metric) - baseline.runs[seed].value(metric) for seed in common}
    if len(common) < 2:
        return Difference(by_seed, None)
    quantile = float(stats.t.ppf((1 + confidence) / 2, len(common) - 1))
    return Difference(by_seed, quantile * estimate(list(by_seed.values())).error)


def check_comparable(ways: Sequence[Way]) -> None:
    """Raise InputError if there is nothing to compare, or if runs were not measured on the same images."""
    if len(ways) < 2:
        given = f"here is only {ways[0].name}" if ways else "here is none"
        raise InputError(f"nothing to compare: {given}; name the folders of runs, trained in at least two ways")
    runs = [run for way in ways for run in way.runs.values()]
    for key in SAME_IMAGES:
        _refuse_if_different(runs, [leaves(run.config)[key] for run in runs], key)
    _refuse_if_different(runs, [int(run.value("images")) for run in runs], "the number of held-out images")


def _refuse_if_different(runs: Sequence[FinishedRun], values: Sequence[object], what: str) -> None:
    for run, value in zip(runs, values, strict=True):
        if value != values[0]:
            raise InputError(
                f"{run.path}: {what} is {value}, {values[0]} in {runs[0].path}: accuracies on different images "
                "cannot be compared"
            )


def differing_keys(runs: Sequence[FinishedRun]) -> dict[str, list[object]]:
    """Keys in which the configurations differ, with the value of each run; seeds and folders left out."""
    configs = [leaves(run.config) for run in runs]
    values = {key: [config[key] for config in configs] for key in configs[0] if key not in OWN_KEYS}
    return {key: of_runs for key, of_runs in values.items() if any(value != of_runs[0] for value in of_runs)}
