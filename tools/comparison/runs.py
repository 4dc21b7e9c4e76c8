"""Finished runs, which of them belong together, and what a way of training gains over the baseline, seed by seed."""

from __future__ import annotations

import glob
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.config import Config
from engine.config_file import leaves, load_config
from engine.errors import InputError
from engine.run_folder import RunFolder
from engine.text import expanded, with_nan
from engine.typed_yaml import Dumper
from engine.writers import Record, read_lines

CONFIDENCE = 0.95
METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "ema_top1": "top-1 accuracy of the EMA",
    "ema_top5": "top-5 accuracy of the EMA",
}  # on held-out images, in percent
OWN_KEYS = ("seed", "output_dir")  # what the runs of one way may differ in


@dataclass(frozen=True)
class Run:
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


@dataclass(frozen=True)
class Way:
    """Runs of one way of training.

    Attributes:
        runs: by seed.
        baseline: what this way is compared with; None if it is a baseline itself.
        base: name of the configuration that a study's way starts from.
        flops: multiply-adds of all forwards of one run, if somebody counted them.
    """

    name: str
    runs: dict[int, Run]
    baseline: Way | None = None
    base: str = ""
    flops: float | None = None

    def values(self, name: str) -> list[float]:
        """One value per seed."""
        return [run.value(name) for run in self.runs.values()]

    def differences(self, metric: str) -> dict[int, float]:
        """This way minus its baseline, for each seed that both have."""
        common = [seed for seed in self.runs if seed in self.baseline.runs]
        return {seed: self.runs[seed].value(metric) - self.baseline.runs[seed].value(metric) for seed in common}

    @property
    def first(self) -> Run:
        """Any run, where all are alike."""
        return next(iter(self.runs.values()))


def interval(values: Collection[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean, and half the width of Student's t interval around it: NaN for a single value, which has none."""
    from scipy import stats  # here: a command's --help does not need it

    half = math.nan
    if len(values) > 1:
        half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem([*values]))
    return statistics.fmean(values), half


def percent(share: float) -> str:
    """`95 %` for 0.95."""
    return f"{100 * share:.4g} %"


def read_run(path: Path) -> Run:
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
    return Run(path, load_config(folder.config), _read_summary(folder), read_lines(folder.metrics))


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


def read_ways(arguments: Sequence[str]) -> list[Way]:
    """Ways of training, in the order in which they are first mentioned; the first one is the baseline.

    Args:
        arguments: folders, and `name=folder,folder` for runs that make one way whatever their configurations;
            a folder may have wildcards.

    Raises:
        InputError: a folder without a finished run, a seed that comes twice in one way, two ways of one name.
    """
    groups: dict[tuple[str, str], list[Run]] = {}  # by the name that the user gave, or else by the configuration
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        is_named = equals and not Path(argument).exists()
        for run in (run for folder in (folders.split(",") if is_named else [argument]) for run in _read_runs(folder)):
            groups.setdefault((name, "") if is_named else ("", recipe(run.config)), []).append(run)
    found = iter(_find_names([runs for (name, _), runs in groups.items() if not name]))
    names = [name or next(found) for name, _ in groups]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{name}: {count} ways have this name; give others: NAME=FOLDER,FOLDER")
    ways: list[Way] = []
    for name, runs in zip(names, groups.values(), strict=True):
        ways.append(Way(name, _by_seed(name, runs), baseline=ways[0] if ways else None))
    return ways


def _read_runs(pattern: str) -> list[Run]:
    path = Path(expanded(pattern))
    matches = [] if path.exists() else sorted(Path(match) for match in glob.glob(str(path)))
    return [read_run(folder) for folder in matches or [path]]


def _by_seed(name: str, runs: Sequence[Run]) -> dict[int, Run]:
    """Lowest seed first."""
    by_seed: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        other = by_seed.setdefault(run.config.seed, run)
        if other is not run:
            raise InputError(f"{name}: two runs of seed {run.config.seed}, {other.path} and {run.path}")
    return by_seed


def _find_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """By what the folders' names have in common; where that does not tell them apart, by the configurations."""
    names = [_common_name(runs) for runs in groups]
    if "" in names or len(set(names)) < len(names):
        differing = differing_keys([runs[0].config for runs in groups])
        texts = [[override_text(key, value) for value in values] for key, values in differing.items()]
        names = [" ".join(words) for words in zip(*texts, strict=True)] or names
    return [name or str(runs[0].path) for name, runs in zip(names, groups, strict=True)]


def _common_name(runs: Sequence[Run]) -> str:
    """`digits_vit` for digits_vit_seed0, digits_vit_seed1 …; empty where that is all the names have."""
    names = {re.sub(rf"(^|[_-])(seed[_-]?)?{run.config.seed}$", "", run.path.resolve().name) for run in runs}
    return names.pop() if len(names) == 1 else ""


def override_text(key: str, value: object) -> str:
    """`key=value` as the command line takes it."""
    flow = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"), sort_keys=False)
    return f"{key}={flow.strip().removesuffix('...').strip()}"  # YAML ends a bare value with a line of dots


def recipe(config: Config) -> str:
    """A configuration but for what the runs of one way may differ in, as text."""
    content = {key: value for key, value in leaves(config).items() if key not in OWN_KEYS}
    return yaml.dump(content, Dumper=Dumper, sort_keys=True)


def differing_keys(configs: Sequence[Config]) -> dict[str, list[object]]:
    """Keys in which configurations differ, with the value of each; seeds and folders left out."""
    contents = [leaves(config) for config in configs]
    values = {key: [content[key] for content in contents] for key in contents[0] if key not in OWN_KEYS}
    return {
        key: of_configs for key, of_configs in values.items() if any(value != of_configs[0] for value in of_configs)
    }


def check_comparable(ways: Sequence[Way]) -> None:
    """Raise InputError if there is nothing to compare, or if runs were not measured on the same images."""
    if len(ways) < 2:
        given = f"here is only {ways[0].name}" if ways else "here is none"
        raise InputError(f"nothing to compare: {given}; name the folders of runs, trained in at least two ways")
    expected: dict[str, object] = {}
    for run in (run for way in ways for run in way.runs.values()):
        images = {
            "data.dataset": run.config.data.dataset,
            "data.eval_split": run.config.data.eval_split,
            "the number of held-out images": int(run.value("images")),
        }
        for what, value in images.items():
            if value != expected.setdefault(what, value):
                raise InputError(
                    f"{run.path}: {what} is {value}, {expected[what]} in {ways[0].first.path}: accuracies on different "
                    "images cannot be compared"
                )
