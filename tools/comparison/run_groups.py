"""Which runs belong together: those whose configurations differ in nothing but the seed, or those the user names."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.errors import InputError
from engine.paths import expanded
from engine.typed_yaml import Dumper
from tools.comparison.finished_runs import FinishedRun, read_run
from tools.comparison.ways import Way, differing_keys


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
