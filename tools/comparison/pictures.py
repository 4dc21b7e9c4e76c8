"""Ways of training as pictures: curves over epochs, and differences to the baseline with their intervals."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from engine.figure import BLUE, OKABE_ITO
from tools.comparison.runs import METRICS, Way, interval

DPI = 130
MOST_COLUMNS, LEGEND_COLUMNS = 4, 3
MOST_MARKERS = 20  # on a line
MOST_LETTERS = 34  # in a line of a panel's title
BEGINNING = 0.25  # of the training, where accuracies may lie below the picture
NUMBERED = re.compile(r"(.+) (\d*\.?\d+)")  # the name of a way, "masking 0.5"
SPENT = "FLOPs of all forwards, in parts of the baseline's"
ByConfig = Mapping[str, Sequence[Way]]  # the ways of each configuration, its baseline first
STYLES = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=OKABE_ITO)  # 28 ways can be told apart


def every_way(by_config: ByConfig) -> list[Way]:
    """The ways of all configurations."""
    return [way for ways in by_config.values() for way in ways]


def draw_curves(ways: Sequence[Way], metric: str) -> Figure:
    """All ways in one pair of axes: training loss on the left, accuracy on the right."""
    height = 4.2 + 0.25 * math.ceil(len(ways) / LEGEND_COLUMNS)
    figure = Figure((11, height), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, ways, "main_loss")
    _draw(accuracy, ways, metric)
    figure.legend(handles=accuracy.lines, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    return figure


def draw_panels(by_config: ByConfig, quantity: str) -> Figure:
    """A panel for each way but the baseline, which is in all of them."""
    ways = every_way(by_config)
    tried = [way for way in ways if way.baseline]
    columns = min(MOST_COLUMNS, len(tried))
    rows = math.ceil(len(tried) / columns)
    figure = Figure((3.7 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(tried) :]:
        axes.set_axis_off()
    for index, (way, axes) in enumerate(zip(tried, grid.flat, strict=False)):
        _draw(axes, [way.baseline, way], quantity)
        highest = max(axes.lines, key=lambda line: line.get_ydata()[-1])
        for line in axes.lines:  # its last value beside it, the upper one above it
            end = line.get_xydata()[-1]
            text = f"{end[1]:.3g}" if quantity == "main_loss" else f"{end[1]:.2f}"
            offset = (6, 2 if line is highest else -9)
            axes.annotate(text, end, offset, textcoords="offset points", color=line.get_color())
        axes.set_xlim(0, 1.25 * max(line.get_xdata()[-1] for line in axes.lines))
        axes.set_title(textwrap.fill(way.name, MOST_LETTERS), fontsize="medium")
        if index % columns:
            axes.set_ylabel("")
    if quantity != "main_loss":  # the first epochs' accuracies would flatten all others
        curves = [curve(way, quantity) for way in ways]
        late = np.concatenate([values[:, epochs >= BEGINNING * epochs[-1]].ravel() for epochs, values in curves])
        margin = 0.06 * np.ptp(late) or 1.0
        grid[0, 0].set_ylim(late.min() - margin, late.max() + margin)
    figure.legend(
        grid[0, 0].lines, ["baseline", "the way in the title"], loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def draw_differences(by_config: ByConfig, metric: str) -> Figure | None:
    """A row for each way but the baseline: its interval, and the difference of each seed."""
    tried = [way for way in every_way(by_config) if way.baseline]
    figure = Figure((8, 1.4 + 0.42 * len(tried)), layout="constrained")
    axes = figure.subplots()
    for row, way in enumerate(tried):
        of_seeds = list(way.differences(metric).values())
        mean, half = interval(of_seeds)
        axes.scatter(of_seeds, [row + 0.25] * len(of_seeds), s=16, color="black", alpha=0.35, linewidth=0)
        axes.errorbar(mean, row, xerr=half, fmt="o", color=BLUE, capsize=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(tried)), [way.name for way in tried])
    axes.set_ylim(len(tried) - 0.5, -0.5)  # the first one on top
    axes.set_xlabel(f"held-out {METRICS[metric]}, difference to the baseline (points)")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    drawn = [axes.collections[0], axes.containers[0]]
    labels = ["one seed", "mean, interval of 95 %"]
    figure.legend(drawn, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def draw(by_config: ByConfig, metric: str, panel: Callable[[Axes, Sequence[Way], str], None]) -> Figure | None:
    """A panel for each configuration, under its name; None if there is nothing in any of them."""
    figure = Figure((6.5 * len(by_config), 4.5), layout="constrained")
    grid = figure.subplots(1, len(by_config), squeeze=False)
    for axes, (config, ways) in zip(grid.flat, by_config.items(), strict=True):
        axes.set_title(config, fontsize="medium")
        axes.grid(alpha=0.3)
        panel(axes, [replace(way, name=way.name.removeprefix(f"{config}, ")) for way in ways], metric)
    return figure if any(axes.has_data() for axes in grid.flat) else None


def prices(axes: Axes, ways: Sequence[Way], metric: str) -> None:
    """Gains over FLOPs, and a line through the ways that no cheaper one beats."""
    points = [(1.0, 0.0)]
    axes.plot(*points[0], "o", color="black")
    axes.annotate("baseline", points[0], (6, 4), textcoords="offset points", fontsize="small")
    costs = {way.name: way.flops / way.baseline.flops for way in ways[1:]}
    for number, way in enumerate(sorted(ways[1:], key=lambda way: costs[way.name]), start=1):
        gain, half = interval(way.differences(metric).values())
        points.append((costs[way.name], gain))
        axes.errorbar(*points[-1], yerr=half, fmt="o", color=BLUE, capsize=3)
        axes.annotate(str(number), points[-1], (5, 4), textcoords="offset points", fontsize="small")
        axes.plot([], [], " ", label=f"{number}  {way.name}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=0, frameon=False, fontsize="small")
    reached, gains = zip(*sorted(points), strict=True)
    axes.step(reached, np.maximum.accumulate(gains), where="post", color="0.5", zorder=0)
    axes.set(xlabel=SPENT, ylabel=f"held-out {METRICS[metric]}, difference to the baseline (points)")
    axes.margins(0.15)


def computation(axes: Axes, ways: Sequence[Way], metric: str) -> None:
    """Accuracies over the computation so far, in parts of the baseline's whole."""
    axes.set_prop_cycle(STYLES)
    for way in ways:
        epochs, values = curve(way, metric)
        spent = epochs / epochs[-1] * way.flops / (way.baseline or way).flops
        axes.plot(spent, values.mean(0), marker="o", markersize=3, label=way.name)
    axes.set(xlabel=SPENT, ylabel=f"held-out {METRICS[metric]} (%)")
    axes.legend(frameon=False, fontsize="small")


def sweep(axes: Axes, ways: Sequence[Way], metric: str) -> None:
    """Accuracies over a number, where three ways or more are named by one word and the number."""
    sweeps: dict[str, list[tuple[float, Way]]] = {}
    for way in ways:
        if named := NUMBERED.fullmatch(way.name):
            sweeps.setdefault(named[1], []).append((float(named[2]), way))
    if max(map(len, sweeps.values()), default=0) < 3:
        return
    axes.axhline(np.mean(ways[0].values(metric)), color="black", linewidth=1, label="baseline")
    for name, points in sweeps.items():
        numbers, of_ways = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        means, halves = zip(*(interval(way.values(metric)) for way in of_ways), strict=True)
        axes.errorbar(numbers, means, yerr=halves, fmt="o-", capsize=3, label=name)
    axes.set(xlabel="ratio", ylabel=f"held-out {METRICS[metric]} (%)")
    axes.legend(frameon=False)


def gradients(axes: Axes, ways: Sequence[Way], metric: str) -> None:
    """The sub-model's gradient in parts of the main model's, over epochs, of those ways that recorded both."""
    axes.set_prop_cycle(STYLES)
    for way in ways:
        (epochs, main), (_, sub) = (curve(way, name) for name in ("main_grad_norm", "sub_grad_norm"))
        if main.size and sub.size:
            axes.plot(epochs, (sub / main).mean(0), label=way.name)
    if axes.has_data():
        axes.set(xlabel="epoch", ylabel="gradient norm, sub-model / main model")
        axes.legend(frameon=False)


def curve(way: Way, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (E,) at which all runs of a way measured something, and its values (S, E), a row per seed."""
    of_runs = [{line["epoch"]: line[quantity] for line in run.records if quantity in line} for run in way.runs.values()]
    epochs = sorted(set.intersection(*map(set, of_runs)))
    return np.array(epochs), np.array([[of_run[epoch] for epoch in epochs] for of_run in of_runs])


def _draw(axes: Axes, ways: Sequence[Way], quantity: str) -> None:
    """A line for each way, the mean over seeds, in the range between the extremes."""
    axes.set_prop_cycle(STYLES)
    for way in ways:
        epochs, values = curve(way, quantity)
        marker = "o" if len(epochs) <= MOST_MARKERS else ""
        (line,) = axes.plot(epochs, values.mean(0), label=way.name, marker=marker, markersize=3)
        axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    if quantity == "main_loss":
        axes.set(ylabel="training loss of the main model", yscale="log")
        axes.margins(y=0.1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())  # as plain numbers, where there are few
    else:
        axes.set_ylabel(f"held-out {METRICS[quantity]} (%)")
    axes.grid(alpha=0.3, which="both")


PICTURES = {  # of a study's page: what they show, and what draws them, in their order
    "differences": ("Differences to the baseline: each seed, and the mean with its interval", draw_differences),
    "price": (
        "Difference to the baseline over the FLOPs of training; the line goes through what nothing cheaper beats",
        partial(draw, panel=prices),
    ),
    "sweep": ("Held-out accuracy over the ratio: means over seeds, and their intervals", partial(draw, panel=sweep)),
    "accuracy": ("Held-out accuracy over epochs: mean over seeds, and the range between the extremes", draw_panels),
    "computation": ("Held-out accuracy over the computation spent: means over seeds", partial(draw, panel=computation)),
    "loss": (
        "Training loss of the main model over epochs: mean over seeds, and the range between the extremes",
        lambda by_config, metric: draw_panels(by_config, "main_loss"),
    ),
    "gradients": (
        "Norm of the sub-model's gradient in parts of the main model's, over epochs",
        partial(draw, panel=gradients),
    ),
}
