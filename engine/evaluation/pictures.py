"""Pictures of what an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_curve

from engine.evaluation.metrics import BINS, MOST_CONFUSED, Metrics, Result
from engine.evaluation.multi_label import MultiLabelMetrics
from engine.figure import BLUE, OKABE_ITO, label_plainly

NAMED = 5  # of many classes those with the lowest average precision
MATRIX_CLASSES = 30  # up to so many classes the matrix can be read
LONGEST_TITLE, LONGEST_CLASS = 50, 24  # characters of the data's and of a class's name in a picture
SCORE_TITLES = {"top1": "top-1 accuracy (%)", "map": "mean average precision (%)"}  # of what models are judged by
CAPTIONS = {  # of all pictures, in their order
    "confusion": "Which classes are taken for which",
    "calibration": "How right the model is when it is so sure, and how often it is",
    "precision_recall": "Precision over recall",
    "ratios": "What sub-models are worth, by the share that they lose",
    "elastic": "What sub-models are worth, by their computation and time",
    "corruptions": "Accuracy and calibration under corruptions",
}
Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]


def score_of(found: Tables) -> str:
    """By which column models are judged."""
    return next(score for score in SCORE_TITLES if score in found["results"][0])


def draw_evaluation(evaluated: Mapping[str, Any], results: Sequence[Result], found: Tables) -> dict[str, Figure]:
    """All pictures that there are of an evaluation, by the names of CAPTIONS; of averaged weights with "ema_".

    Args:
        evaluated: what was evaluated and how.
        found: the tables of the results.
    """
    title, names = f"{evaluated['model']}\n{evaluated['data'][-LONGEST_TITLE:]}", evaluated["class_names"]
    pictures: dict[str, Figure | None] = {}
    for result in results:
        if result.augmentation is not None:
            continue
        prefix, of_weights = result.prefix, f"{title}{', averaged weights' if result.prefix else ''}"
        if isinstance(result.metrics, MultiLabelMetrics):
            pictures[f"{prefix}precision_recall"] = draw_precision_recall(result.metrics, names, of_weights)
        else:
            pictures[f"{prefix}confusion"] = draw_confusion(result.metrics, names, of_weights)
            pictures[f"{prefix}calibration"] = draw_calibration(result.metrics, of_weights)
    pictures["ratios"] = draw_ratios(found, title)
    pictures["elastic"] = draw_elastic(found, title)
    pictures["corruptions"] = draw_corruptions(found["corruptions"], title)
    return {name: figure for name, figure in pictures.items() if figure is not None}


def draw_confusion(metrics: Metrics, class_names: Sequence[str], title: str) -> Figure:
    """The matrix of few classes, shares of the true class in percent; the most confused pairs of many."""
    names = [name[:LONGEST_CLASS] for name in class_names]
    side = 3.2 + 0.42 * min(len(names), MATRIX_CLASSES)
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    if len(names) <= MATRIX_CLASSES:
        images = metrics.confusion.cpu().numpy()
        shares = 100 * images / np.maximum(images.sum(axis=1, keepdims=True), 1)
        display = ConfusionMatrixDisplay(shares, display_labels=names)
        style = {"cmap": "Blues", "values_format": ".0f", "text_kw": {"fontsize": 8}, "im_kw": {"vmin": 0, "vmax": 100}}
        display.plot(
            ax=axes, colorbar=False, xticks_rotation="vertical" if max(map(len, names)) > 2 else "horizontal", **style
        )
        axes.set(xlabel="predicted class", ylabel="true class, % of its images")
    else:
        pairs = metrics.most_confused(MOST_CONFUSED)
        labels = [f"{names[true]} → {names[predicted]}" for true, predicted, _ in pairs]
        axes.bar_label(axes.barh(range(len(pairs)), [images for *_, images in pairs], color=BLUE), padding=3)
        axes.set_yticks(range(len(pairs)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel=f"images, of the most confused pairs of {len(names)} classes", ylabel="true → predicted class")
    return figure


def draw_precision_recall(metrics: MultiLabelMetrics, class_names: Sequence[str], title: str) -> Figure:
    """Precision over recall of each of few classes; of many, the average precision of each over its images."""
    figure = Figure((6.4, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    rows = [row for row in metrics.of_classes(class_names) if row["images"]]
    if len(rows) <= len(OKABE_ITO):
        for row, colour in zip(rows, OKABE_ITO, strict=False):
            number = class_names.index(row["class"])
            label = f"{row['class'][:LONGEST_CLASS]}, AP {row['ap']:.1f} %"
            curve = precision_recall_curve(metrics.targets[:, number], metrics.probabilities[:, number])
            axes.plot(curve[1], curve[0], drawstyle="steps-post", color=colour, label=label)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.scatter([row["images"] for row in rows], [row["ap"] for row in rows], s=12, color=BLUE)
        axes.set(xlabel="held-out images of the class", ylabel="average precision (%)", xscale="log", ylim=(0, 101))
        label_plainly(axes.xaxis)
        for row in sorted(rows, key=lambda row: row["ap"])[:NAMED]:
            place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(row["class"][:LONGEST_CLASS], (row["images"], row["ap"]), **place)
    axes.grid(alpha=0.3)
    return figure


def draw_calibration(metrics: Metrics, title: str) -> Figure:
    """Reliability diagram: accuracy over confidence above, where the images are below."""
    images, confidence, correct = metrics.calibration.cpu().numpy()
    filled = images > 0
    figure = Figure((5.4, 6.4), layout="constrained")
    diagram, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    accuracy, mean_confidence = correct[filled] / images[filled], confidence[filled] / images[filled]
    CalibrationDisplay(accuracy, mean_confidence, y_prob=None).plot(ax=diagram, name="model", color=BLUE)
    diagram.set(xlabel="", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    diagram.set_title(f"{title}\nECE {metrics.calibration_error:.2f} %, {BINS} bins", fontsize="medium")
    histogram.bar((np.arange(BINS) + 0.5) / BINS, 100 * images / images.sum(), 1 / BINS, color=BLUE, edgecolor="white")
    histogram.set(xlabel="confidence (largest softmax probability)", ylabel="images (%)")
    return figure


def draw_ratios(found: Tables, title: str) -> Figure | None:
    """Top-1 of sub-models over their ratio, if there are some that were evaluated at several ratios."""
    curves: dict[str, list[tuple[float, float]]] = {}
    score = score_of(found)
    for row in found["sub_models"]:
        if row["ratio"] is not None:
            curves.setdefault(f"{row['sub_model']}, {row['weights']} weights", []).append((row["ratio"], row[score]))
    if not any(len(points) > 1 for points in curves.values()):
        return None
    figure = Figure((6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=OKABE_ITO, marker=list("os^DvPX"))
    main = found["results"][0][score]
    axes.axhline(main, color="gray", linestyle="--", marker="", label=f"main model, {main:.2f} %")
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), label=name)
    axes.set(xlabel="ratio: share that the sub-model loses", ylabel=SCORE_TITLES[score])
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_elastic(found: Tables, title: str) -> Figure | None:
    """Accuracy over multiply-adds and over measured time of main model and sub-models, if forwards were timed."""
    main, score = found["results"][0], score_of(found)
    rows = [row for row in found["sub_models"] if row["weights"] == main["weights"] and row["ratio"] is not None]
    if "infer_gmacs" not in main or not rows:
        return None
    figure = Figure((9.6, 4.2), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (column, what) in zip(both, (("infer_gmacs", "GMACs"), ("infer_step_time", "ms")), strict=True):
        axes.plot(main[column], main[score], marker="*", markersize=14, color="black", linestyle="", label="main model")
        for colour, name in zip(OKABE_ITO, dict.fromkeys(row["sub_model"] for row in rows), strict=False):
            own = sorted((row for row in rows if row["sub_model"] == name), key=lambda row: row["ratio"])
            axes.plot([row[column] for row in own], [row[score] for row in own], "o-", color=colour, label=name)
            for row in own:
                place = {"xytext": (4, -10), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(f"{row['ratio']:g}", (row[column], row[score]), **place)
        axes.set(xlabel=f"{what} of {'an image' if what == 'GMACs' else 'a batch'}", xlim=(0, None))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    both[0].set_ylabel(SCORE_TITLES[score])
    both[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def draw_corruptions(lines: Sequence[Row], title: str) -> Figure | None:
    """Top-1 accuracy and calibration error by corruption and severity; of averaged weights, if there are some."""
    of_weights = [line for line in lines if line["weights"] == lines[-1]["weights"]]
    if not of_weights:
        return None
    names = list(dict.fromkeys(line["corruption"] for line in of_weights))
    panels = (("top1", "top-1 accuracy (%)", "Blues"), ("ece", "expected calibration error (%)", "Oranges"))
    size = (11, 1.6 + 0.34 * len(names))
    figure = Figure(size, layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (column, what, colours) in zip(both, panels, strict=True):
        values = np.array([line[column] for line in of_weights]).reshape(len(names), -1)
        axes.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
        for (row, severity), value in np.ndenumerate(values):
            axes.text(severity, row, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else "black")
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.set(xlabel="severity", title=what)
    both[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    figure.suptitle(title, fontsize="medium")
    return figure
