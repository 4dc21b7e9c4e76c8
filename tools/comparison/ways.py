"""Ways of training side by side: means over seeds, and what a way gains over the baseline, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from engine.config_file import leaves
from engine.errors import InputError
from tools.comparison.finished_runs import FinishedRun

CONFIDENCE = 0.95
SAME_IMAGES = ("data.dataset", "data.eval_split")  # what runs must share to be measured on the same images
OWN_KEYS = ("seed", "output_dir")  # what the runs of one way may differ in


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
