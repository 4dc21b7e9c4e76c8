"""Pictures of a run: how they look, the curves of what happened, the learning rate to come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rcParams
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from engine import atomic
from engine.errors import input_errors, writing_errors
from engine.writers import Record

if TYPE_CHECKING:
    from engine.optim import Schedule  # who draws something else does not wait for timm

rcParams["text.parse_math"] = False  # a $ in the name of a run or a class is a $
# Okabe and Ito's palette, for colour-blind readers too; their yellow is too pale for lines
OKABE_ITO = BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure in the format that the file's name ends in, whole or not at all.

    Raises:
        InputError: matplotlib does not know the format.
        RunError: the file cannot be written.
    """
    with input_errors(str(path)), writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.new_content(path) as file:
            figure.savefig(file, dpi=dpi, format=path.suffix.removeprefix(".") or None)


class PlainLogFormatter(LogFormatter):
    """Labels as many ticks of a logarithmic axis as matplotlib does, with numbers as people write them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def label_plainly(axis: Axis) -> None:
    """Plain numbers at the ticks of a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(PlainLogFormatter())  # where there are few


MOST_MARKERS = 200  # on a line
# Of the curves of a run, in two panels: what is drawn by which name, in which colour
CURVES = (
    {
        "main_loss": ("main model", BLUE),
        "sub_loss": ("sub-model", VERMILION),
        "eval_loss": ("main model, held-out images", GREEN),
    },
    {
        "top1": ("main model", GREEN),
        "ema_top1": ("EMA of the main model", PURPLE),
        "map": ("main model, mAP", GREEN),
        "ema_map": ("EMA of the main model, mAP", PURPLE),
    },
)


def draw_curves(records: Sequence[Record], title: str) -> Figure:
    """Training losses on the left, held-out accuracy on the right, over epochs."""
    figure = Figure((11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, curves in zip(panels, CURVES, strict=True):
        for name, (label, colour) in curves.items():
            points = [(record["epoch"], record[name]) for record in records if name in record]
            if points:
                marker = "o" if len(points) <= MOST_MARKERS else ""
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=2.5)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    losses, accuracy = panels
    losses.set(title="Loss", xlabel="epoch", ylabel="loss", yscale="log")
    label_plainly(losses.yaxis)
    is_map = any("map" in record for record in records)
    accuracy.set(xlabel="epoch", ylabel="mean average precision (%)" if is_map else "top-1 accuracy (%)")
    accuracy.set_title("Held-out images" if is_map else "Held-out accuracy")
    figure.suptitle(title)
    return figure


POINTS = 2000  # more than the picture has columns


def draw_schedule(schedule: Schedule, steps_per_epoch: int, stop: float | None, full_rate: float, title: str) -> Figure:
    """Draw all steps of a schedule.

    Args:
        steps_per_epoch: 1 where a step of the schedule is an epoch.
        stop: epoch at which the run ends before its schedule does.
        full_rate: largest `lr_scale` of a parameter group, whose learning rate is shown.
    """
    steps = [*range(0, schedule.total, max(1, schedule.total // POINTS)), schedule.total]
    epochs = [step / steps_per_epoch for step in steps]
    rates = [full_rate * schedule(min(step, schedule.total - 1)) for step in steps]
    figure = Figure((7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    if schedule.warmup:
        axes.axvspan(0, (schedule.lag + schedule.warmup) / steps_per_epoch, color=ORANGE, alpha=0.2, label="warmup")
    axes.plot(
        epochs, rates, color=BLUE, label="learning rate", drawstyle="steps-post" if steps_per_epoch == 1 else None
    )
    if stop is not None:
        axes.axvline(stop, color=VERMILION, linestyle="--", label=f"train.max_iters, epoch {stop:.4g}")
    axes.set(title=title, xlabel="epoch", ylabel="learning rate", xlim=(0, schedule.total / steps_per_epoch))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
