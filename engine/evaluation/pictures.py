"""Pictures of an evaluation: which classes are taken for which, whether confidence is right, what ratios cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from engine.evaluation.meters import Calibration, Confusion
from engine.figure import BLUE, GREEN, PURPLE, SKY, VERMILION, save

MARKERS = "os^Dv"
MATRIX_CLASSES = 30  # up to so many classes the matrix can be read
NUMBERED_CLASSES = 16  # and the numbers in it
PAIRS = 25  # of classes, where there are more


def draw_confusion(confusion: Confusion, names: Sequence[str], title: str, path: Path) -> None:
    """The matrix of few classes, the most confused pairs of many."""
    if len(names) <= MATRIX_CLASSES:
        _draw_matrix(confusion.totals.cpu().numpy(), [_short(name) for name in names], title, path)
    else:
        _draw_pairs(confusion, names, title, path)


def _draw_matrix(images: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    shares = 100 * images / np.maximum(images.sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.42 * len(names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="share of the true class's images (%)", shrink=0.8)
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{title}\nnumber of images" if len(names) <= NUMBERED_CLASSES else title, fontsize="medium")
    if len(names) <= NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(images):
            if count:
                colour = "white" if shares[row, column] > 50 else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=8)
    save(figure, path)


def _draw_pairs(confusion: Confusion, names: Sequence[str], title: str, path: Path) -> None:
    pairs = confusion.most_confused(PAIRS)
    labels = [f"{_short(names[true])} → {_short(names[predicted])}" for true, predicted, _ in pairs]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.26 * max(len(pairs), 1)), layout="constrained")
    bars = axes.barh(range(len(pairs)), [images for *_, images in pairs], color=BLUE)
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="images", ylabel="true class → predicted class")
    axes.set_title(f"{title}\nthe {len(pairs)} most confused pairs of {len(names)} classes", fontsize="medium")
    axes.margins(x=0.08)
    save(figure, path)


def draw_calibration(calibration: Calibration, title: str, path: Path) -> None:
    """Reliability diagram: accuracy over confidence above, where the images are below."""
    images, confidence, correct = calibration.totals.cpu().numpy()
    filled = images > 0
    width = 1 / calibration.BINS
    middles = (np.arange(calibration.BINS) + 0.5) * width
    accuracy, mean_confidence = (
        np.divide(part, images, out=np.zeros_like(part), where=filled) for part in (correct, confidence)
    )
    figure, (diagram, histogram) = plt.subplots(
        2, 1, figsize=(5.4, 6.4), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    diagram.plot((0, 1), (0, 1), color="gray", linestyle="--", linewidth=1, label="perfect calibration")
    diagram.bar(middles[filled], accuracy[filled], width, color=SKY, edgecolor="white", label="accuracy")
    points = {"linestyle": "", "marker": "o", "clip_on": False, "zorder": 3}
    diagram.plot(mean_confidence[filled], accuracy[filled], color=VERMILION, label="at the mean confidence", **points)
    diagram.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    diagram.set_title(f"{title}\nECE {calibration.error:.2f} %, {calibration.BINS} bins", fontsize="medium")
    histogram.bar(middles, 100 * images / images.sum(), width, color=BLUE, edgecolor="white")
    histogram.set(xlabel="confidence (largest softmax probability)", ylabel="images (%)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    for axes in (diagram, histogram):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    save(figure, path)


def draw_ratios(curves: Mapping[str, Sequence[tuple[float, float]]], main: float, title: str, path: Path) -> None:
    """Top-1 of sub-models over their ratio; `main` is the main model's."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.axhline(main, color="gray", linestyle="--", linewidth=1, label=f"main model, {main:.2f} %")
    for index, (name, points) in enumerate(curves.items()):
        colour = (BLUE, VERMILION, GREEN, PURPLE, SKY)[index % 5]
        axes.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[index % 5], label=name)
        if len(curves) == 1:
            _write_values(axes, points, colour)
    axes.set(xlabel="ratio: share that the sub-model loses", ylabel="top-1 accuracy (%)")
    axes.set_title(title, fontsize="medium")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def _write_values(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    for point in points:
        axes.annotate(
            f"{point[1]:.1f}", point, (-4, -6), textcoords="offset points", ha="right", va="top", color=colour
        )


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
