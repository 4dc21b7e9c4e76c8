"""What an evaluation found: tables for the terminal; JSON, CSV and pictures in a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_curve
from tabulate import tabulate

from engine import atomic
from engine.config import OF_SEVERAL_LABELS, sides
from engine.data.images import IGNORED
from engine.errors import writing_errors
from engine.evaluation import BINS, MOST_CONFUSED, Metrics, Result
from engine.figure import BLUE, OKABE_ITO, label_plainly, save
from engine.multi_label import MultiLabelMetrics
from engine.text import to_json

NAMED = 5  # of many classes those with the lowest average precision
MATRIX_CLASSES = 30  # up to so many classes the matrix can be read
LONGEST_TITLE, LONGEST_CLASS = 50, 24  # characters of the data's and of a class's name in a picture
# Files of which there are some evaluations without
NOT_ALWAYS = (
    "corruptions.csv",
    "corruptions.png",
    "sub_models.csv",
    "ratios.png",
    "elastic.png",
    "ema_confusion.png",
    "ema_calibration.png",
    "precision_recall.png",
    "ema_precision_recall.png",
    "predictions.csv",
    "ema_predictions.csv",
)
SCORE_TITLES = {"top1": "top-1 accuracy (%)", "map": "mean average precision (%)"}  # of what models are judged by
SCORES = ("top1", "top1_low", "top1_high", "top5", *OF_SEVERAL_LABELS)
SPEED = ("infer_samples_per_sec", "infer_latency", "infer_gmacs")
BUDGETS = (0.75, 0.5, 0.25)  # of the main model's multiply-adds
# Columns of the terminal's tables; the files have more
PRINTED = {
    "results": ("weights", "images", *SCORES, "cross_entropy", "ece", *SPEED),
    "sub_models": ("weights", "sub_model", "ratio", *SCORES, "cross_entropy", *SPEED),
}
Row = dict[str, Any]


def rows(evaluated: Mapping[str, Any], results: Sequence[Result]) -> dict[str, list[Row]]:
    """The tables of an evaluation, by name. "results" has the columns of timm's results/*.csv, then others."""
    found: dict[str, list[Row]] = {"results": [], "classes": [], "corruptions": [], "sub_models": []}
    for result in results:
        figures, weights = result.metrics.figures(), {"weights": result.weights}
        cross_entropy = {"cross_entropy": round(figures["eval_loss"], 5)}
        if result.augmentation is not None:
            name, ratio = result.sub_model
            row = {**weights, "sub_model": name, "ratio": ratio, **_scores(figures), **cross_entropy}
            row |= {name: round(value, 3) for name, value in result.speed.items()}
            found["sub_models"].append(row)
            continue
        model = {"model": evaluated["model"], "img_size": _as_number(evaluated["image_size"]), **_scores(figures)}
        model["param_count"] = round(evaluated["parameters"] / 1e6, 2)  # millions, as there
        model |= {"crop_pct": evaluated["crop"], "interpolation": evaluated["interpolation"], **weights}
        model |= {"images": figures["images"], **cross_entropy}
        model |= {name: round(figures[name], 3) for name in ("ece", "balanced_accuracy") if name in figures}
        for name, interval in getattr(result.metrics, "intervals", dict)().items():
            model |= {f"{name}_{end}": round(value, 3) for end, value in zip(("low", "high"), interval, strict=True)}
        model |= {f"{name}_top1": round(top1, 3) for name, top1 in result.probes.items()}
        model |= {name: round(value, 3) for name, value in result.speed.items()}
        found["results"].append(model)
        found["classes"] += [{**weights, **row} for row in result.metrics.of_classes(evaluated["class_names"])]
        for place, part in result.parts.items() if len(result.parts) > 1 else ():
            corruption, severity = place.split("/")
            row = {**weights, "corruption": corruption, "severity": severity, **_scores(part)}
            row["ece"] = round(part["ece"], 3)
            found["corruptions"].append(row)
    return found


def _as_number(image_size: int | Sequence[int]) -> int | str:
    """A square's side; 192x256 of other images."""
    height, width = sides(image_size)
    return height if height == width else f"{height}x{width}"


def _scores(figures: Mapping[str, float]) -> Row:
    """Top-1 and top-5 in percent with their errors, as timm writes them, or what there is of several labels."""
    if "map" in figures:
        return {name: round(figures[name], 3) for name in OF_SEVERAL_LABELS}
    return {
        column: round(value, 3)
        for name in ("top1", "top5")
        for column, value in ((name, figures[name]), (f"{name}_err", 100 - figures[name]))
    }


def tables(evaluated: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The tables for the terminal, in percent."""
    size = "{} x {} pixels".format(*sides(evaluated["image_size"]))
    if evaluated["crop"] is not None:
        size += f", crop {evaluated['crop']:g}, {evaluated['interpolation']}"
    blocks = [f"{evaluated['model']}, {evaluated['source']}\n{evaluated['data']}, {size}"]
    found = rows(evaluated, results)
    for name, columns in PRINTED.items():
        if found[name]:
            there = found[name][0]
            own = [column for column in columns if column in there]
            own += [column for column in there if column.endswith("_top1")]
            blocks.append(tabulate([[row[column] for column in own] for row in found[name]], headers=own))
    blocks += _elastic(found)
    errors: dict[tuple[str, str], list[float]] = {}
    for row in found["corruptions"]:
        errors.setdefault((row["weights"], row["corruption"]), []).append(row["top1_err"])
    if errors:
        cells = [[*which, *values, sum(values) / len(values)] for which, values in errors.items()]
        main = [result for result in results if result.augmentation is None]
        means = [[result.weights, "mean", *[None] * 5, result.mean_corruption_error] for result in main]
        headers = ["weights", "corruption", *"12345", "mean"]
        blocks.append(f"top-1 error in % by severity\n{tabulate([*cells, *means], headers=headers, floatfmt='.2f')}")
        blocks += [
            f"mCE of {result.weights} weights, in % of AlexNet's errors: {result.mce:.2f}"
            for result in main
            if result.mce is not None
        ]
    return "\n\n".join(blocks)


def _score(found: Mapping[str, Sequence[Row]]) -> str:
    """By which column models are judged."""
    return next(score for score in ("map", "top1") if score in found["results"][0])


def _elastic(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """For each budget of multiply-adds the sub-model that keeps most, if their forwards were counted."""
    main, score = found["results"][0], _score(found)
    if "infer_gmacs" not in main or not found["sub_models"]:
        return []
    rows = []
    for budget in BUDGETS:
        within = [row for row in found["sub_models"] if row["infer_gmacs"] <= budget * main["infer_gmacs"]]
        best = max(within, key=lambda row: row[score], default=None)
        if best is not None:
            kept = [best[key] for key in ("sub_model", "ratio", score, "infer_gmacs", "infer_samples_per_sec")]
            rows.append([f"{100 * budget:.0f} %", *kept])
    headers = ["of the GMACs", "sub_model", "ratio", score, "infer_gmacs", "infer_samples_per_sec"]
    return [f"best for a budget\n{tabulate(rows, headers=headers)}"] if rows else []


def write(folder: Path, evaluated: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Files of all results of an evaluation, in place of those of an earlier one.

    Raises:
        RunError: one of them cannot be written.
    """
    for name in NOT_ALWAYS:
        (folder / name).unlink(missing_ok=True)
    found, names = rows(evaluated, results), evaluated["class_names"]
    content = {**evaluated, "results": _as_json(names, results)}
    files = {"results.json": to_json(content, indent=2)}
    files |= {f"{name}.csv": _as_csv(lines) for name, lines in found.items() if lines}
    files |= {
        f"{result.prefix}predictions.csv": _as_csv(_predictions(result.metrics, names))
        for result in results
        if result.augmentation is None and len(result.parts) == 1 and isinstance(result.metrics, Metrics)
    }
    for name, text in files.items():
        with writing_errors(folder / name):
            atomic.write_text(folder / name, text)
    title = f"{evaluated['model']}\n{evaluated['data'][-LONGEST_TITLE:]}"
    for result in results:
        if result.augmentation is None:
            of_weights = f"{title}{', averaged weights' if result.prefix else ''}"
            if isinstance(result.metrics, MultiLabelMetrics):
                draw_precision_recall(
                    result.metrics, names, of_weights, folder / f"{result.prefix}precision_recall.png"
                )
                continue
            draw_confusion(result.metrics, names, of_weights, folder / f"{result.prefix}confusion.png")
            draw_calibration(result.metrics, of_weights, folder / f"{result.prefix}calibration.png")
    draw_ratios(found, title, folder / "ratios.png")
    draw_elastic(found, title, folder / "elastic.png")
    draw_corruptions(found["corruptions"], title, folder / "corruptions.png")


def _as_json(names: Sequence[str], results: Sequence[Result]) -> list[Row]:
    """Of each of the weights all that is known, with its sub-models."""
    content: list[Row] = []
    for result in results:
        metrics = result.metrics
        if result.augmentation is not None:
            name, ratio = result.sub_model
            content[-1]["sub_models"].append(
                {"name": name, "ratio": ratio, "figures": metrics.figures(), **result.speed}
            )
            continue
        content.append(
            {
                "weights": result.weights,
                **metrics.figures(),
                **{f"{name}_top1": top1 for name, top1 in result.probes.items()},
                **result.speed,
                **metrics.details(names),
                "sub_models": [],
            }
        )
        if len(result.parts) > 1:
            content[-1] |= {
                "mean_corruption_error": result.mean_corruption_error,
                "corruption_errors": result.corruption_errors,
                **({} if result.mce is None else {"mce": result.mce}),
                "parts": result.parts,
            }
    return content


def _predictions(metrics: Metrics, names: Sequence[str]) -> list[Row]:
    """A line for each image, by its number in the data set, that has a label and could be read."""
    return [
        {"image": number, "true": names[true], "predicted": names[predicted]}
        for number, (true, predicted) in enumerate(metrics.outcomes.T.tolist())
        if true != IGNORED
    ]


def _as_csv(lines: Sequence[Row]) -> str:
    """Lines with the columns of the first one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def draw_confusion(metrics: Metrics, class_names: Sequence[str], title: str, path: Path) -> None:
    """The matrix of few classes, shares of the true class in percent; the most confused pairs of many."""
    names = [name[:LONGEST_CLASS] for name in class_names]
    side = 3.2 + 0.42 * min(len(names), MATRIX_CLASSES)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    axes.set_title(title, fontsize="medium")
    if len(names) <= MATRIX_CLASSES:
        images = metrics.confusion.cpu().numpy()
        shares = 100 * images / np.maximum(images.sum(axis=1, keepdims=True), 1)
        display = ConfusionMatrixDisplay(shares, display_labels=names)
        style = {"cmap": "Blues", "values_format": ".0f", "text_kw": {"fontsize": 8}, "im_kw": {"vmin": 0, "vmax": 100}}
        display.plot(ax=axes, xticks_rotation="vertical" if max(map(len, names)) > 2 else "horizontal", **style)
        axes.set(xlabel="predicted class", ylabel="true class, % of its images")
    else:
        pairs = metrics.most_confused(MOST_CONFUSED)
        labels = [f"{names[true]} → {names[predicted]}" for true, predicted, _ in pairs]
        axes.bar_label(axes.barh(range(len(pairs)), [images for *_, images in pairs], color=BLUE), padding=3)
        axes.set_yticks(range(len(pairs)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel=f"images, of the most confused pairs of {len(names)} classes", ylabel="true → predicted class")
    save(figure, path)


def draw_precision_recall(metrics: MultiLabelMetrics, class_names: Sequence[str], title: str, path: Path) -> None:
    """Precision over recall of each of few classes; of many, the average precision of each over its images."""
    figure, axes = plt.subplots(figsize=(6.4, 5), layout="constrained")
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
    save(figure, path)


def draw_calibration(metrics: Metrics, title: str, path: Path) -> None:
    """Reliability diagram: accuracy over confidence above, where the images are below."""
    images, confidence, correct = metrics.calibration.cpu().numpy()
    filled = images > 0
    figure, (diagram, histogram) = plt.subplots(
        2, 1, figsize=(5.4, 6.4), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    accuracy, mean_confidence = correct[filled] / images[filled], confidence[filled] / images[filled]
    CalibrationDisplay(accuracy, mean_confidence, y_prob=None).plot(ax=diagram, name="model", color=BLUE)
    diagram.set(xlabel="", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    diagram.set_title(f"{title}\nECE {metrics.calibration_error:.2f} %, {BINS} bins", fontsize="medium")
    histogram.bar((np.arange(BINS) + 0.5) / BINS, 100 * images / images.sum(), 1 / BINS, color=BLUE, edgecolor="white")
    histogram.set(xlabel="confidence (largest softmax probability)", ylabel="images (%)")
    save(figure, path)


def draw_ratios(found: Mapping[str, Sequence[Row]], title: str, path: Path) -> None:
    """Top-1 of sub-models over their ratio, if there are some that were evaluated at several ratios."""
    curves: dict[str, list[tuple[float, float]]] = {}
    score = _score(found)
    for row in found["sub_models"]:
        if row["ratio"] is not None:
            curves.setdefault(f"{row['sub_model']}, {row['weights']} weights", []).append((row["ratio"], row[score]))
    if not any(len(points) > 1 for points in curves.values()):
        return
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.set_prop_cycle(color=OKABE_ITO, marker=list("os^DvPX"))
    main = found["results"][0][score]
    axes.axhline(main, color="gray", linestyle="--", marker="", label=f"main model, {main:.2f} %")
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), label=name)
    axes.set(xlabel="ratio: share that the sub-model loses", ylabel=SCORE_TITLES[score])
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def draw_elastic(found: Mapping[str, Sequence[Row]], title: str, path: Path) -> None:
    """Accuracy over multiply-adds and over measured time of main model and sub-models, if forwards were timed."""
    main, score = found["results"][0], _score(found)
    rows = [row for row in found["sub_models"] if row["weights"] == main["weights"] and row["ratio"] is not None]
    if "infer_gmacs" not in main or not rows:
        return
    figure, both = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True)
    for axes, (column, what) in zip(both, (("infer_gmacs", "GMACs"), ("infer_step_time", "ms")), strict=True):
        axes.plot(main[column], main[score], marker="*", markersize=14, color="black", linestyle="", label="main model")
        for colour, name in zip(OKABE_ITO, dict.fromkeys(row["sub_model"] for row in rows), strict=False):
            own = sorted((row for row in rows if row["sub_model"] == name), key=lambda row: row["ratio"])
            axes.plot([row[column] for row in own], [row[score] for row in own], "o-", color=colour, label=name)
            for row in own:
                place = {"xytext": (4, -10), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(f"{row['ratio']:g}", (row[column], row[score]), **place)
        axes.set(xlabel=f"{what} of {'an image' if what == 'GMACs' else 'a batch'}", xlim=(0, None))
        axes.grid(alpha=0.3)
    both[0].set_ylabel(SCORE_TITLES[score])
    both[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def draw_corruptions(lines: Sequence[Row], title: str, path: Path) -> None:
    """Top-1 accuracy and calibration error by corruption and severity; of averaged weights, if there are some."""
    of_weights = [line for line in lines if line["weights"] == lines[-1]["weights"]]
    if not of_weights:
        return
    names = list(dict.fromkeys(line["corruption"] for line in of_weights))
    panels = (("top1", "top-1 accuracy (%)", "Blues"), ("ece", "expected calibration error (%)", "Oranges"))
    size = (11, 1.6 + 0.34 * len(names))
    figure, both = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axes, (column, what, colours) in zip(both, panels, strict=True):
        values = np.array([line[column] for line in of_weights]).reshape(len(names), -1)
        axes.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
        for (row, severity), value in np.ndenumerate(values):
            axes.text(severity, row, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else "black")
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.set(xlabel="severity", title=what)
    both[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    figure.suptitle(title, fontsize="medium")
    save(figure, path)
