"""Results of an evaluation in a folder: JSON, CSV and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import atomic
from engine.errors import writing_errors
from engine.evaluation import pictures
from engine.evaluation.results import WEIGHTS, Evaluated, Setting, SubModelFigures, mean_corruption_error
from engine.json_text import to_json

MOST_CONFUSED = 25  # pairs that are listed
TITLE = 50  # characters of the data's name in a picture, its last ones
# Files of which there are some evaluations without
NOT_ALWAYS = ("corruptions.csv", "sub_models.csv", "ratios.png", "ema_confusion.png", "ema_calibration.png")
Row = dict[str, Any]


def write(folder: Path, setting: Setting, evaluated: Sequence[Evaluated]) -> None:
    """Files of all results of an evaluation, in place of those of an earlier one.

    Raises:
        RunError: one of them cannot be written.
    """
    for name in NOT_ALWAYS:
        (folder / name).unlink(missing_ok=True)
    _write_csv(folder / "results.csv", [_result_row(setting, one) for one in evaluated])
    _write_csv(folder / "classes.csv", [row for one in evaluated for row in class_rows(setting, one)])
    content = {**vars(setting), "results": [_as_json(setting, one) for one in evaluated]}
    _write_text(folder / "results.json", to_json(content, indent=2))
    if parts := [row for one in evaluated for row in _part_rows(one)]:
        _write_csv(folder / "corruptions.csv", parts)
    if subs := [row for one in evaluated for row in _sub_model_rows(one)]:
        _write_csv(folder / "sub_models.csv", subs)
    data = setting.data if len(setting.data) <= TITLE else f"…{setting.data[1 - TITLE :]}"
    title = f"{setting.model}\n{data}"
    for one in evaluated:
        measured, kind = one.outcome.whole, "" if not one.prefix else ", averaged weights"
        pictures.draw_confusion(
            measured.confusion, setting.class_names, f"{title}{kind}", folder / f"{one.prefix}confusion.png"
        )
        pictures.draw_calibration(measured.calibration, f"{title}{kind}", folder / f"{one.prefix}calibration.png")
    curves = {
        f"{name}{', averaged weights' if one.prefix else ''}": points
        for one in evaluated
        for name, points in ratio_curves(one.sub_models).items()
    }
    if curves:
        pictures.draw_ratios(curves, evaluated[0].outcome.whole.figures()["top1"], title, folder / "ratios.png")


def class_rows(setting: Setting, one: Evaluated) -> list[Row]:
    """Images and top-1 in percent of each class; None for a class without images."""
    confusion = one.outcome.whole.confusion.totals
    counts, hits = confusion.sum(dim=1).tolist(), confusion.diag().tolist()
    return [
        {
            "weights": WEIGHTS[one.prefix],
            "class": name,
            "images": int(count),
            "top1": round(100 * hit / count, 3) if count else None,
        }
        for name, count, hit in zip(setting.class_names, counts, hits, strict=True)
    ]


def ratio_curves(sub_models: Sequence[SubModelFigures]) -> dict[str, list[tuple[float, float]]]:
    """Points (ratio, top-1) by name, of sub-models that were evaluated at several ratios."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for sub in sub_models:
        if sub.ratio is not None:
            curves.setdefault(sub.name, []).append((sub.ratio, sub.figures["top1"]))
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def _result_row(setting: Setting, one: Evaluated) -> Row:
    """The columns of timm's results/*.csv, then what it does not have."""
    figures = one.outcome.whole.figures()
    return {
        "model": setting.model,
        "img_size": setting.image_size,
        **_accuracies(figures),
        "param_count": round(setting.parameters / 1e6, 2),  # millions, as there
        "crop_pct": setting.crop,
        "interpolation": setting.interpolation,
        "weights": WEIGHTS[one.prefix],
        "images": figures["images"],
        "cross_entropy": round(figures["eval_loss"], 5),
        "ece": round(figures["ece"], 3),
    }


def _as_json(setting: Setting, one: Evaluated) -> Row:
    names, measured = setting.class_names, one.outcome.whole
    images, confidence, correct = measured.calibration.totals.tolist()
    content = {
        "weights": WEIGHTS[one.prefix],
        **measured.figures(),
        "calibration": {"images": images, "confidence_sum": confidence, "correct": correct},
        "most_confused": [
            {"true": names[true], "predicted": names[predicted], "images": count}
            for true, predicted, count in measured.confusion.most_confused(MOST_CONFUSED)
        ],
        "sub_models": [vars(sub) for sub in one.sub_models],
    }
    if len(one.outcome.parts) > 1:
        content |= {"mean_corruption_error": mean_corruption_error(one.outcome), "parts": one.outcome.parts}
    return content


def _part_rows(one: Evaluated) -> list[Row]:
    if len(one.outcome.parts) < 2:
        return []
    return [
        {
            "weights": WEIGHTS[one.prefix],
            "corruption": name.partition("/")[0],
            "severity": name.partition("/")[2],
            **_accuracies(figures),
        }
        for name, figures in one.outcome.parts.items()
    ]


def _sub_model_rows(one: Evaluated) -> list[Row]:
    return [
        {
            "weights": WEIGHTS[one.prefix],
            "sub_model": sub.name,
            "ratio": sub.ratio,
            **_accuracies(sub.figures),
            "cross_entropy": round(sub.figures["eval_loss"], 5),
        }
        for sub in one.sub_models
    ]


def _accuracies(figures: dict[str, float]) -> Row:
    """Top-1 and top-5 in percent with their errors, three digits after the point, as timm writes them."""
    return {
        column: round(value, 3)
        for name in ("top1", "top5")
        for column, value in ((name, figures[name]), (f"{name}_err", 100 - figures[name]))
    }


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write_text(path, text.getvalue())


def _write_text(path: Path, text: str) -> None:
    with writing_errors(path):
        atomic.write_text(path, text)
