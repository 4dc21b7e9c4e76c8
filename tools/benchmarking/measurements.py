"""Lines of the benchmark: what was measured, beside the limit that arithmetic sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate

PARTS = {"steps": "Training steps", "memory": "Peak memory", "data": "Loading alone"}


@dataclass(frozen=True)
class Measurement:
    """One line of a table.

    Attributes:
        part: of the benchmark.
        case: what it was measured on; lines of one case were measured in turns.
        name: what was measured.
        value: median, in `unit`.
        ratio: to the line `against` of the same case, the median over rounds; None for a line of reference.
        low, high: quartiles of that ratio.
        limit: what arithmetic allows for the ratio; None where it says nothing.
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
    note: str = ""

    @property
    def cells(self) -> list[str]:
        """Its row, without the case."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"
        limit = "" if self.limit is None else f"{self.limit:.3f}"
        return [self.name, f"{self.value:.4g} {self.unit}", ratio, self.against, limit, self.note]


def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device, repeats: int = 1
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


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio_of(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired rounds, as fields of a `Measurement`."""
    ratios = [one / other for one, other in zip(these, those, strict=True)]
    if len(ratios) == 1:
        return {"ratio": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "low": low, "high": high}


def table(measurements: Sequence[Measurement], style: str = "simple") -> str:
    """The lines of one part."""
    cases = [line.case for line in measurements]
    rows = [
        ["" if index and cases[index - 1] == line.case else line.case, *line.cells]
        for index, line in enumerate(measurements)
    ]
    headers = ["case", "", "median", "ratio [quartiles]", "to", "limit", ""]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)
