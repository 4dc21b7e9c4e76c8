"""What the benchmark trains, and the lines of its tables: what was measured, beside the limit that arithmetic sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from tabulate import tabulate

PARTS = {"steps": "Training steps", "memory": "Peak memory", "data": "Loading alone"}


@dataclass(frozen=True)
class Setting:
    """What is trained, where and how."""

    model: str
    image_size: int
    batch: int
    device: torch.device
    amp: str = "off"
    compiled: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        switches = [name for name in ("compiled", "channels_last") if getattr(self, name)]
        precision = "fp32" if self.amp == "off" else self.amp
        return ", ".join([self.model, f"{self.image_size} px", f"batch {self.batch}", precision, *switches])


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


def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of every step in every round; in each round all have their turn, every time another one first.

    Args:
        warm_up: rounds that are not counted.
        repeats: times that a step runs in its turn.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            wait()
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def compared(
    part: str,
    case: str,
    unit: str,
    rounds: Mapping[str, Sequence[float]],
    against: Mapping[str, str],
    limits: Mapping[str, float] = MappingProxyType({}),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> list[Measurement]:
    """Lines of what was measured in so many rounds.

    Args:
        against: by name, that of another one whose paired rounds it is divided by.
    """
    lines = []
    for name, values in rounds.items():
        ratio = {}
        if against.get(name) in rounds:
            ratios = np.divide(values, rounds[against[name]])
            low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
            ratio = {"ratio": median, "low": low, "high": high, "against": against[name]}
        limit, note = limits.get(name), notes.get(name, "")
        lines.append(Measurement(part, case, name, float(np.median(values)), unit, limit=limit, note=note, **ratio))
    return lines


def table(measurements: Sequence[Measurement], style: str = "simple") -> str:
    """The lines of one part."""
    rows, case = [], None
    for line in measurements:
        ratio = "" if line.ratio is None else f"{line.ratio:.3f} [{line.low:.3f}, {line.high:.3f}]"
        limit = "" if line.limit is None else f"{line.limit:.3f}"
        shown = "" if line.case == case else line.case
        rows.append([shown, line.name, f"{line.value:.4g} {line.unit}", ratio, line.against, limit, line.note])
        case = line.case
    headers = ["case", "", "median", "ratio [quartiles]", "to", "limit", ""]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)
