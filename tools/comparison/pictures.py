"""Ways of training as pictures: curves over epochs, and differences to the baseline with their intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from engine.errors import InputError
from engine.figure import BLUE, OKABE_ITO, VERMILION, save
from tools.comparison.runs import CONFIDENCE, Way, paired_difference
from tools.comparison.tables import Comparisons, percent

LABELS = {
    "top1": "held-out top-1 accuracy (%)",
    "top5": "held-out top-5 accuracy (%)",
    "ema_top1": "held-out top-1 accuracy of the EMA (%)",
    "ema_top5": "held-out top-5 accuracy of the EMA (%)",
    "main_loss": "training loss of the main model",
}
STYLES = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=OKABE_ITO)  # 28 ways can be told apart
DPI = 130
MOST_COLUMNS, LEGEND_COLUMNS = 4, 3
MOST_MARKERS = 20  # on a line
MOST_LETTERS = 34  # in a line of a panel's title
BEGINNING = 0.25  # of the training, where accuracies may lie below the picture


def draw_curves(ways: Sequence[Way], metric: str, path: Path) -> None:
    """All ways in one pair of axes: training loss on the left, accuracy on the right."""
    height = 4.2 + 0.25 * math.ceil(len(ways) / LEGEND_COLUMNS)
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    for axes, quantity in ((loss, "main_loss"), (accuracy, metric)):
        axes.set_prop_cycle(STYLES)
        for way in ways:
            _draw_way(axes, way, quantity)
        _finish(axes, quantity)
    handles, names = accuracy.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    save(figure, path, DPI)


def draw_panels(comparisons: Comparisons, quantity: str, path: Path) -> None:
    """A panel for each way but the baseline, which is in all of them."""
    pairs = [(title, ways[0], way) for title, ways in comparisons.items() for way in ways[1:]]
    columns = min(MOST_COLUMNS, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.7 * columns, 3.3 * rows), layout="constrained", squeeze=False, sharey=True
    )
    panels = list(grid.flat)
    for axes, (title, baseline, way) in zip(panels, pairs, strict=False):
        colours = {baseline.name: BLUE, way.name: VERMILION}
        ends = {drawn.name: _draw_way(axes, drawn, quantity, color=colours[drawn.name]) for drawn in (baseline, way)}
        _mark_ends(axes, ends, colours, quantity)
        _finish(axes, quantity)
        axes.set_title(textwrap.fill(_panel_title(comparisons, title, way), MOST_LETTERS), fontsize="medium")
        if axes not in grid[:, 0]:
            axes.set_ylabel("")
    for unused in panels[len(pairs) :]:
        unused.set_axis_off()
    _start_late(panels[0], pairs, quantity)
    tried = {way.name for _, _, way in pairs}
    names = [pairs[0][1].name, tried.pop() if len(tried) == 1 else "the way in the title"]
    figure.legend(panels[0].lines, names, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path, DPI)


def draw_differences(comparisons: Comparisons, metric: str, path: Path) -> None:
    """A row for each way but the baseline: its interval, and the difference of each seed."""
    rows = [
        (_panel_title(comparisons, title, way), way, ways[0]) for title, ways in comparisons.items() for way in ways[1:]
    ]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    for height, (_, way, baseline) in enumerate(rows):
        difference = paired_difference(way, baseline, metric)
        if not difference.by_seed:
            continue
        seeds = list(difference.by_seed.values())
        axes.plot(
            seeds,
            [height + 0.25] * len(seeds),
            "o",
            color="black",
            alpha=0.35,  # darker where seeds coincide
            markersize=4,
            markeredgewidth=0,
            label="" if height else "one seed",
        )
        axes.errorbar(
            difference.mean,
            height,
            xerr=difference.half_width,
            fmt="o",
            color=BLUE,
            capsize=3,
            label="" if height else f"mean, interval of {percent(CONFIDENCE)}",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first one on top
    baselines = {ways[0].name for ways in comparisons.values()}
    axes.set_xlabel(f"{LABELS[metric].removesuffix(' (%)')}, difference to {', '.join(sorted(baselines))} (points)")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    save(figure, path, DPI)


def curve(way: Way, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (E,) at which all runs of a way measured something, and its values (S, E), a row per seed.

    Raises:
        InputError: there is no such epoch.
    """
    of_runs = [
        {record["epoch"]: record[quantity] for record in run.records if quantity in record} for run in way.runs.values()
    ]
    epochs = sorted(set.intersection(*map(set, of_runs)))
    if not epochs:
        raise InputError(f"{way.name}: no epoch at which all its runs have {quantity} in metrics.jsonl")
    return np.array(epochs), np.array([[of_run[epoch] for epoch in epochs] for of_run in of_runs])


def _draw_way(axes: Axes, way: Way, quantity: str, **style: object) -> tuple[float, float]:
    """Mean over seeds, and the range between the extremes; returns the last point of the mean."""
    epochs, values = curve(way, quantity)
    marker = "o" if len(epochs) <= MOST_MARKERS else ""
    (line,) = axes.plot(epochs, values.mean(0), label=way.name, marker=marker, markersize=3, **style)
    axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    return float(epochs[-1]), float(values[:, -1].mean())


def _mark_ends(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str], quantity: str) -> None:
    """Write the last value beside each curve, the upper one above it."""
    highest = max(ends, key=lambda name: ends[name][1])
    for name, end in ends.items():
        offset = (6, 2 if name == highest else -9)
        text = f"{end[1]:.2g}" if quantity == "main_loss" else f"{end[1]:.2f}"
        axes.annotate(text, end, offset, textcoords="offset points", color=colours[name])
    axes.set_xlim(0, 1.25 * max(epoch for epoch, _ in ends.values()))


def _finish(axes: Axes, quantity: str) -> None:
    axes.set(xlabel="epoch", ylabel=LABELS[quantity])
    if quantity == "main_loss":
        axes.set_yscale("log")
        axes.margins(y=0.1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())  # as plain numbers, where there are few
    axes.grid(alpha=0.3, which="both")


def _start_late(axes: Axes, pairs: Sequence[tuple[str, Way, Way]], quantity: str) -> None:
    """Leave the first epochs' accuracies out of the picture, which would flatten all others."""
    if quantity == "main_loss":
        return
    late = []
    for _, *ways in pairs:
        for way in ways:
            epochs, values = curve(way, quantity)
            late.append(values[:, epochs >= BEGINNING * epochs[-1]])
    low, high = min(values.min() for values in late), max(values.max() for values in late)
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _panel_title(comparisons: Comparisons, title: str, way: Way) -> str:
    if len(comparisons) == 1:
        return way.name
    return title if all(len(ways) == 2 for ways in comparisons.values()) else f"{title}, {way.name}"
