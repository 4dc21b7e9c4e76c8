"""curves.png: what happened during a run, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from engine.figure import BLUE, GREEN, PURPLE, VERMILION, save
from engine.writers import Record

LOSS_COLOURS = {"main_loss": BLUE, "sub_loss": VERMILION}
ACCURACY_COLOURS = {"top1": GREEN, "ema_top1": PURPLE}
LABELS = {"main_loss": "main model", "sub_loss": "sub-model", "top1": "main model", "ema_top1": "EMA of the main model"}


def draw_curves(records: Sequence[Record], title: str, path: Path) -> None:
    """Training losses on the left, held-out accuracy on the right, over epochs."""
    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw(losses, records, LOSS_COLOURS)
    losses.set(title="Training loss", xlabel="epoch", ylabel="loss", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter(LogFormatter())  # as plain numbers, where there are few
    _draw(accuracy, records, ACCURACY_COLOURS)
    accuracy.set(title="Held-out accuracy", xlabel="epoch", ylabel="top-1 accuracy (%)")
    _mark_last(accuracy, records)
    figure.suptitle(title)
    save(figure, path)


def _draw(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        points = [(record["epoch"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=LABELS[name], marker="o", markersize=2.5)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def _mark_last(axes: Axes, records: Sequence[Record]) -> None:
    evaluated = [record for record in records if "top1" in record]
    if evaluated:
        last = evaluated[-1]
        axes.axhline(last["top1"], color=ACCURACY_COLOURS["top1"], linestyle=":", linewidth=1)
        axes.annotate(
            f"{last['top1']:.1f} %",
            (last["epoch"], last["top1"]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="right",
            color=ACCURACY_COLOURS["top1"],
        )
