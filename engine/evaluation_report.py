"""What an evaluation found: tables for the terminal; JSON, CSV and pictures in a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay
from tabulate import tabulate

from engine import atomic
from engine.errors import writing_errors
from engine.evaluation import BINS, Description, Metrics, Result
from engine.figure import BLUE, OKABE_ITO, SKY, VERMILION, save
from engine.text import to_json

MOST_CONFUSED = 25  # pairs of classes that are listed and drawn
MATRIX_CLASSES = 30  # up to so many classes the matrix can be read
NUMBERED_CLASSES = 16  # and the numbers in it
LONGEST_TITLE, LONGEST_CLASS = 50, 24  # characters of the data's and of a class's name in a picture
# Files of which there are some evaluations without
NOT_ALWAYS = ("corruptions.csv", "sub_models.csv", "ratios.png", "ema_confusion.png", "ema_calibration.png")
Row = dict[str, Any]  # of a CSV file


def tables(description: Description, results: Sequence[Result]) -> str:
    """The tables for the terminal."""
    size = f"{description.image_size} x {description.image_size} pixels"
    if description.crop is not None:
        size += f", crop {description.crop:g}, {description.interpolation}"
    columns = ["images", "top-1, %", "top-5, %", "cross-entropy"]
    rows = [[result.weights, *_cells(result), f"{result.metrics.calibration_error:.2f}"] for result in results]
    blocks = [
        f"{description.model}, {description.source}\n{description.data}, {size}",
        _table(["weights", *columns, "ECE, %"], rows),
    ]
    blocks += [_corruption_table(result) for result in results if len(result.parts) > 1]
    rows = [
        [sub.weights, sub.name, "" if sub.ratio is None else f"{sub.ratio:g}", *_cells(sub)]
        for result in results
        for sub in result.sub_models
    ]
    if rows:
        blocks.append(_table(["weights", "sub-model", "ratio", *columns], rows))
    return "\n\n".join(blocks)


def _corruption_table(result: Result) -> str:
    """Top-1 error of each corruption and severity."""
    errors: dict[str, list[float]] = {}
    for name, figures in result.parts.items():
        errors.setdefault(name.partition("/")[0], []).append(100 - figures["top1"])
    rows = [
        [name, *(f"{error:.2f}" for error in values), f"{sum(values) / len(values):.2f}"]
        for name, values in errors.items()
    ]
    rows.append(["mean", *[""] * 5, f"{result.mean_corruption_error:.2f}"])
    title = f"top-1 error in %, {result.weights} weights (not divided by AlexNet's)"
    return f"{title}\n{_table(['corruption', *'12345', 'mean'], rows)}"


def _cells(result: Result) -> list[str]:
    figures = result.metrics.figures()
    accuracy = [f"{figures[name]:.3f}" for name in ("top1", "top5")]
    return [str(figures["images"]), *accuracy, f"{figures['eval_loss']:.4f}"]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def write(folder: Path, description: Description, results: Sequence[Result]) -> None:
    """Files of all results of an evaluation, in place of those of an earlier one.

    Raises:
        RunError: one of them cannot be written.
    """
    for name in NOT_ALWAYS:
        (folder / name).unlink(missing_ok=True)
    content = {**vars(description), "results": [_as_json(description, result) for result in results]}
    files = {
        "results.json": to_json(content, indent=2),
        "results.csv": _as_csv([_summary_row(description, result) for result in results]),
        "classes.csv": _as_csv([row for result in results for row in class_rows(description, result)]),
        "corruptions.csv": _as_csv([row for result in results for row in _corruption_rows(result)]),
        "sub_models.csv": _as_csv([_sub_model_row(sub) for result in results for sub in result.sub_models]),
    }
    for name, text in files.items():
        if text:
            with writing_errors(folder / name):
                atomic.write_text(folder / name, text)
    title, curves = f"{description.model}\n{_short(description.data[::-1], LONGEST_TITLE)[::-1]}", {}
    for result in results:
        kind = ", averaged weights" if result.prefix else ""
        names = description.class_names
        draw_confusion(result.metrics, names, f"{title}{kind}", folder / f"{result.prefix}confusion.png")
        draw_calibration(result.metrics, f"{title}{kind}", folder / f"{result.prefix}calibration.png")
        curves |= {f"{name}{kind}": points for name, points in ratio_curves(result.sub_models).items()}
    if curves:
        draw_ratios(curves, results[0].metrics.figures()["top1"], title, folder / "ratios.png")


def _as_json(description: Description, result: Result) -> Row:
    names, metrics = description.class_names, result.metrics
    images, confidence, correct = metrics.calibration.tolist()
    content = {
        "weights": result.weights,
        **metrics.figures(),
        "calibration": {"images": images, "confidence_sum": confidence, "correct": correct},
        "most_confused": [
            {"true": names[true], "predicted": names[predicted], "images": count}
            for true, predicted, count in metrics.most_confused(MOST_CONFUSED)
        ],
        "sub_models": [
            {"name": sub.name, "ratio": sub.ratio, "figures": sub.metrics.figures()} for sub in result.sub_models
        ],
    }
    if len(result.parts) > 1:
        content |= {"mean_corruption_error": result.mean_corruption_error, "parts": result.parts}
    return content


def _as_csv(rows: Sequence[Row]) -> str:
    """Lines with the columns of the first row; nothing if there are no rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _summary_row(description: Description, result: Result) -> Row:
    """The columns of timm's results/*.csv, then what it does not have."""
    figures = result.metrics.figures()
    return {
        "model": description.model,
        "img_size": description.image_size,
        **_accuracies(figures),
        "param_count": round(description.parameters / 1e6, 2),  # millions, as there
        "crop_pct": description.crop,
        "interpolation": description.interpolation,
        "weights": result.weights,
        "images": figures["images"],
        "cross_entropy": round(figures["eval_loss"], 5),
        "ece": round(figures["ece"], 3),
    }


def class_rows(description: Description, result: Result) -> list[Row]:
    """Images and top-1 in percent of each class; None for a class without images."""
    confusion = result.metrics.confusion
    counts, hits = confusion.sum(dim=1).tolist(), confusion.diag().tolist()
    return [
        {
            "weights": result.weights,
            "class": name,
            "images": int(count),
            "top1": round(100 * hit / count, 3) if count else None,
        }
        for name, count, hit in zip(description.class_names, counts, hits, strict=True)
    ]


def _corruption_rows(result: Result) -> list[Row]:
    places = [name.partition("/") for name in result.parts] if len(result.parts) > 1 else []
    return [
        {"weights": result.weights, "corruption": corruption, "severity": severity, **_accuracies(figures)}
        for (corruption, _, severity), figures in zip(places, result.parts.values(), strict=False)
    ]


def _sub_model_row(sub: Result) -> Row:
    figures = sub.metrics.figures()
    row = {"weights": sub.weights, "sub_model": sub.name, "ratio": sub.ratio, **_accuracies(figures)}
    return {**row, "cross_entropy": round(figures["eval_loss"], 5)}


def _accuracies(figures: Mapping[str, float]) -> Row:
    """Top-1 and top-5 in percent with their errors, three digits after the point, as timm writes them."""
    return {
        column: round(value, 3)
        for name in ("top1", "top5")
        for column, value in ((name, figures[name]), (f"{name}_err", 100 - figures[name]))
    }


def ratio_curves(sub_models: Sequence[Result]) -> dict[str, list[tuple[float, float]]]:
    """Points (ratio, top-1) by name, of sub-models that were evaluated at several ratios."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for sub in sub_models:
        if sub.ratio is not None:
            curves.setdefault(sub.name, []).append((sub.ratio, sub.metrics.figures()["top1"]))
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def draw_confusion(metrics: Metrics, class_names: Sequence[str], title: str, path: Path) -> None:
    """The matrix of few classes, coloured by shares of the true class; the most confused pairs of many."""
    names = [_short(name, LONGEST_CLASS) for name in class_names]
    if len(names) > MATRIX_CLASSES:
        _draw_pairs(metrics.most_confused(MOST_CONFUSED), names, title, path)
        return
    images, is_numbered = metrics.confusion.cpu().numpy(), len(names) <= NUMBERED_CLASSES
    shares = 100 * images / np.maximum(images.sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.42 * len(names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    display = ConfusionMatrixDisplay(shares, display_labels=names).plot(
        ax=axes,
        cmap="Blues",
        include_values=is_numbered,
        text_kw={"fontsize": 8},
        xticks_rotation="vertical" if max(map(len, names)) > 2 else "horizontal",
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 100},
    )
    figure.colorbar(display.im_, ax=axes, label="share of the true class's images (%)", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{title}\nnumber of images" if is_numbered else title, fontsize="medium")
    for cell, count in np.ndenumerate(images) if is_numbered else ():
        display.text_[cell].set_text(f"{count:.0f}" if count else "")
    save(figure, path)


def _draw_pairs(pairs: Sequence[tuple[int, int, int]], names: Sequence[str], title: str, path: Path) -> None:
    labels = [f"{names[true]} → {names[predicted]}" for true, predicted, _ in pairs]
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


def draw_calibration(metrics: Metrics, title: str, path: Path) -> None:
    """Reliability diagram: accuracy over confidence above, where the images are below."""
    images, confidence, correct = metrics.calibration.cpu().numpy()
    filled = images > 0
    middles = (np.arange(BINS) + 0.5) / BINS
    accuracy, mean_confidence = correct[filled] / images[filled], confidence[filled] / images[filled]
    figure, (diagram, histogram) = plt.subplots(
        2, 1, figsize=(5.4, 6.4), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    diagram.plot((0, 1), (0, 1), color="gray", linestyle="--", linewidth=1, label="perfect calibration")
    diagram.bar(middles[filled], accuracy, 1 / BINS, color=SKY, edgecolor="white", label="accuracy")
    points = {"linestyle": "", "marker": "o", "clip_on": False, "zorder": 3}
    diagram.plot(mean_confidence, accuracy, color=VERMILION, label="at the mean confidence", **points)
    diagram.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    diagram.set_title(f"{title}\nECE {metrics.calibration_error:.2f} %, {BINS} bins", fontsize="medium")
    histogram.bar(middles, 100 * images / images.sum(), 1 / BINS, color=BLUE, edgecolor="white")
    histogram.set(xlabel="confidence (largest softmax probability)", ylabel="images (%)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    for axes in (diagram, histogram):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    save(figure, path)


def draw_ratios(curves: Mapping[str, Sequence[tuple[float, float]]], main: float, title: str, path: Path) -> None:
    """Top-1 of sub-models over their ratio; `main` is the main model's."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.set_prop_cycle(color=OKABE_ITO, marker=list("os^DvPX"))
    axes.axhline(main, color="gray", linestyle="--", linewidth=1, marker="", label=f"main model, {main:.2f} %")
    for name, points in curves.items():
        (line,) = axes.plot(*zip(*points, strict=True), label=name)
        for point in points if len(curves) == 1 else ():
            axes.annotate(
                f"{point[1]:.1f}", point, (-4, -6), textcoords="offset points", ha="right", va="top",
                color=line.get_color(),
            )  # fmt: skip
    axes.set(xlabel="ratio: share that the sub-model loses", ylabel="top-1 accuracy (%)")
    axes.set_title(title, fontsize="medium")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
