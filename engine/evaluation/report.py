"""What an evaluation found: tables for the terminal; JSON, CSV and pictures in a folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from engine import atomic
from engine.config import OF_SEVERAL_LABELS, sides
from engine.data.images import IGNORED
from engine.errors import InputError, writing_errors
from engine.evaluation.metrics import Metrics, Result
from engine.evaluation.pictures import CAPTIONS, Row, Tables, draw_evaluation, score_of
from engine.figure import save
from engine.html_report import picture_line, plain, write_report
from engine.text import markdown_table, to_csv, to_json

RESULTS = "results.json"  # which every evaluation writes
# Files of which there are some evaluations without
NOT_ALWAYS = (
    *(f"{prefix}{name}.png" for prefix in ("", "ema_") for name in CAPTIONS),
    *(f"{name}.csv" for name in ("corruptions", "sub_models", "predictions", "ema_predictions")),
)
SCORES = ("top1", "top1_low", "top1_high", "top5", *OF_SEVERAL_LABELS)
SPEED = ("infer_samples_per_sec", "infer_latency", "infer_gmacs")
F1_NOTE = "f1 is that of probabilities above 0.5, best_f1 that of those above `threshold`."
BUDGETS = (0.75, 0.5, 0.25)  # of the main model's multiply-adds
# Columns of the terminal's tables; the files have more
PRINTED = {
    "results": ("weights", "images", *SCORES, "difference", "cross_entropy", "ece", *SPEED),
    "sub_models": ("weights", "sub_model", "ratio", *SCORES, "cross_entropy", *SPEED),
}


def rows(evaluated: Mapping[str, Any], results: Sequence[Result]) -> dict[str, list[Row]]:
    """The tables of an evaluation, by name. "results" has the columns of timm's results/*.csv, then others."""
    found: dict[str, list[Row]] = {"results": [], "classes": [], "corruptions": [], "sub_models": []}
    for result in results:
        figures, weights = result.metrics.figures(), {"weights": result.weights}
        cross_entropy = {"cross_entropy": round(figures["eval_loss"], 5)}
        if result.augmentation is not None:
            name, ratio = result.sub_model
            row = {**weights, "sub_model": name, "ratio": ratio, **_scores(figures), **cross_entropy}
            row |= _measured(result.speed)
            found["sub_models"].append(row)
            continue
        model = {"model": evaluated["model"], "img_size": _as_number(evaluated["image_size"]), **_scores(figures)}
        model["param_count"] = round(evaluated["parameters"] / 1e6, 2)  # millions, as there
        model |= {"crop_pct": evaluated["crop"], "interpolation": evaluated["interpolation"], **weights}
        model |= {"images": figures["images"], **cross_entropy}
        model |= {name: round(figures[name], 3) for name in ("ece", "balanced_accuracy") if name in figures}
        # versions of the same images say less than as many images
        intervals = {} if len(result.parts) > 1 else getattr(result.metrics, "intervals", dict)()
        for name, interval in intervals.items():
            model |= {f"{name}_{end}": round(value, 3) for end, value in zip(("low", "high"), interval, strict=True)}
        model |= {f"{name}_top1": round(top1, 3) for name, top1 in result.probes.items()}
        if result.clean:
            clean = round(result.clean["top1"], 3)
            model |= {"clean_top1": clean, "difference": round(figures["top1"] - clean, 3)}
        model |= _measured(result.speed)
        found["results"].append(model)
        found["classes"] += [{**weights, **row} for row in result.metrics.of_classes(evaluated["class_names"])]
        for place, part in result.parts.items() if len(result.parts) > 1 else ():
            corruption, severity = place.split("/")
            row = {**weights, "corruption": corruption, "severity": severity, **_scores(part)}
            row["ece"] = round(part["ece"], 3)
            found["corruptions"].append(row)
    return found


def _measured(speed: Mapping[str, float]) -> Row:
    """Five significant digits: a small model has thousandths of a GMAC. Counts stay as they are."""
    return {name: value if isinstance(value, int) else float(f"{value:.5g}") for name, value in speed.items()}


def _described_size(evaluated: Mapping[str, Any]) -> str:
    """How large images were, and how they got so."""
    size = "{} x {} pixels".format(*sides(evaluated["image_size"]))
    return size if evaluated["crop"] is None else f"{size}, crop {evaluated['crop']:g}, {evaluated['interpolation']}"


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
    size = _described_size(evaluated)
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


def _elastic(found: Tables) -> list[str]:
    """For each budget of multiply-adds the first weights' sub-model that keeps most, if their forwards were counted."""
    main, score = found["results"][0], score_of(found)
    if "infer_gmacs" not in main or not found["sub_models"]:
        return []
    rows, own = [], [row for row in found["sub_models"] if row["weights"] == main["weights"]]
    for budget in BUDGETS:
        within = [row for row in own if row["infer_gmacs"] <= budget * main["infer_gmacs"]]
        best = max(within, key=lambda row: row[score], default=None)
        if best is not None:
            kept = [best[key] for key in ("sub_model", "ratio", score, "infer_gmacs", "infer_samples_per_sec")]
            rows.append([f"{100 * budget:.0f} %", *kept])
    headers = ["of the GMACs", "sub_model", "ratio", score, "infer_gmacs", "infer_samples_per_sec"]
    return [f"best for a budget\n{tabulate(rows, headers=headers)}"] if rows else []


def check_folder(folder: Path) -> None:
    """Raise InputError if a folder has files of such names, and they are not an evaluation's."""
    there = [name for name in (*NOT_ALWAYS, "results.csv", "classes.csv", "report.html") if (folder / name).exists()]
    if there and not (folder / RESULTS).exists():
        raise InputError(f"--output {folder}: has {there[0]} and no {RESULTS} of an evaluation: name another folder")


def write(folder: Path, evaluated: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Files of all results of an evaluation, in place of those of an earlier one; see `check_folder`.

    Raises:
        RunError: one of them cannot be written.
    """
    for name in NOT_ALWAYS:
        (folder / name).unlink(missing_ok=True)
    found, names = rows(evaluated, results), evaluated["class_names"]
    content = {**evaluated, "results": _as_json(names, results)}
    files = {RESULTS: to_json(content, indent=2)}
    files |= {f"{name}.csv": to_csv(lines) for name, lines in found.items() if lines}
    files |= {
        f"{result.prefix}predictions.csv": to_csv(_predictions(result.metrics, names))
        for result in results
        if result.augmentation is None and len(result.parts) == 1 and isinstance(result.metrics, Metrics)
    }
    for name, text in files.items():
        with writing_errors(folder / name):
            atomic.write_text(folder / name, text)
    pictures = draw_evaluation(evaluated, results, found)
    for name, figure in pictures.items():
        save(figure, folder / f"{name}.png")
    examples = {title: images for result in results for title, images in result.examples.items()}
    write_report(folder / "report.html", _page(evaluated, results, found, pictures), {**pictures, **examples})


def _page(evaluated: Mapping[str, Any], results: Sequence[Result], found: Tables, pictures: Collection[str]) -> str:
    """The report as Markdown."""

    def shown(*names: str) -> list[str]:
        """Those of the pictures that there are."""
        ways = {"": "", "ema_": ", averaged weights"}
        return [
            f"![{CAPTIONS[name]}{which}]({prefix}{name})"
            for name in names
            for prefix, which in ways.items()
            if prefix + name in pictures
        ]

    def examples(of_sub_models: bool) -> list[str]:
        own = [result for result in results if (result.augmentation is not None) == of_sub_models]
        titles = dict.fromkeys(title for result in own for title in result.examples)
        return [picture_line(title) for title in titles]

    of_class = next(iter(found["classes"]), {})
    sections = {
        f"# {plain(evaluated['model'])}": [
            f"{plain(evaluated['source'])}  \n{plain(evaluated['data'])}, {_described_size(evaluated)}",
            _figures_table(found["results"]),
            *shown("confusion", "calibration", "precision_recall"),
        ],
        "## Mistakes": examples(of_sub_models=False),
        "## Sub-models": [
            *_table(found["sub_models"], [name for name in PRINTED["sub_models"] if name != "weights"]),
            *shown("ratios", "elastic"),
            *examples(of_sub_models=True),
        ],
        "## Corruptions": [*shown("corruptions"), *_table(found["corruptions"], ())],
        "## Classes": [
            *(
                ["f1 is that of probabilities above 0.5, best_f1 that of those above `threshold`."]
                if "f1" in of_class
                else []
            ),
            *_table(found["classes"], ()),
        ],
    }
    return "\n\n".join(part for title, parts in sections.items() if parts for part in (title, *parts))


def _figures_table(rows: Sequence[Row]) -> str:
    """A line for each figure, with its interval, a column for each of the weights."""
    names = [
        name for name in rows[0] if name not in ("weights", "model") and not name.endswith(("_err", "_low", "_high"))
    ]
    cells = [
        [
            name,
            *(
                f"{row[name]} [{row[f'{name}_low']}, {row[f'{name}_high']}]" if f"{name}_low" in row else row[name]
                for row in rows
            ),
        ]
        for name in names
        if rows[0][name] is not None
    ]
    return markdown_table(["", *(row["weights"] for row in rows)] if len(rows) > 1 else ["", "value"], cells)


def _cell(value: Any) -> str:
    """A value of a table, as Markdown."""
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else plain(value)


def _table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Rows of a table, if there are some, in these columns or in all; which weights they are of where that differs."""
    if not rows:
        return []
    weights = ["weights"] if len({row["weights"] for row in rows}) > 1 else []
    names = weights + [name for name in columns or rows[0] if name in rows[0] and name != "weights"]
    return [markdown_table(names, [[_cell(row[name]) for name in names] for row in rows])]


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
                **({"clean": dict(result.clean)} if result.clean else {}),
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
