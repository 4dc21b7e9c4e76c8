"""Figures of the benchmark: what was measured, beside the limit that arithmetic sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate

Step = Callable[[], object]

PARTS = {
    "steps": "Training steps",
    "memory": "Peak memory",
    "optimizer": "Optimiser and moving average alone",
    "data": "Loading alone",
    "processes": "Gradients between processes",
}


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    Attributes:
        part: of the benchmark.
        case: what it was measured on; lines of one case were measured in turns.
        name: what was measured.
        value: median, in `unit`.
        ratio: to the line `against` of the same case, the median over rounds; None for a line of reference.
        low, high: quartiles of that ratio.
        limit: what arithmetic allows for the ratio; None where it says nothing.
        target: what the project wants of the ratio.
        at_least: the target is a lower bound, not an upper one.
        note: anything else, in a few words.
    """

    part: str
    case: str
    name: str
    value: float
    unit: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    against: str = ""
    limit: float | None = None
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty without one."""
        if self.target is None or self.ratio is None:
            return ""
        is_met = self.ratio >= self.target if self.at_least else self.ratio <= self.target
        return f"{'met' if is_met else 'missed'} ({'≥' if self.at_least else '≤'} {self.target:.3g})"


def in_turns(
    steps: Mapping[str, Step], rounds: int, warm_up: int, device: torch.device, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of every step in every round; in each round all have their turn, every time another one first.

    Args:
        warm_up: rounds that are not counted.
        repeats: times that a step runs in its turn.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait_for(device)
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            _wait_for(device)
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio_of(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired rounds, as fields of a `Figure`."""
    ratios = [one / other for one, other in zip(these, those, strict=True)]
    if len(ratios) == 1:
        return {"ratio": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "low": low, "high": high}


def table(figures: Sequence[Figure], style: str = "simple") -> str:
    """The figures of one part."""
    rows = [
        [
            figure.case if index == 0 or figures[index - 1].case != figure.case else "",
            figure.name,
            f"{figure.value:.4g} {figure.unit}",
            "" if figure.ratio is None else f"{figure.ratio:.3f} [{figure.low:.3f}, {figure.high:.3f}]",
            figure.against,
            "" if figure.limit is None else f"{figure.limit:.3f}",
            figure.verdict,
            figure.note,
        ]
        for index, figure in enumerate(figures)
    ]
    headers = ["case", "", "median", "ratio [quartiles]", "to", "limit", "target", ""]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
