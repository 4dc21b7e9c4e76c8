"""Results of an evaluation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from engine.evaluation.results import WEIGHTS, Evaluated, Setting, mean_corruption_error


def printed(setting: Setting, evaluated: Sequence[Evaluated]) -> str:
    """The tables for the terminal."""
    size = f"{setting.image_size} x {setting.image_size} pixels"
    if setting.crop is not None:
        size += f", crop {setting.crop:g}, {setting.interpolation}"
    headers = ["weights", "images", "top-1, %", "top-5, %", "cross-entropy", "ECE, %"]
    rows = [
        [WEIGHTS[one.prefix], *_cells(one.outcome.whole.figures()), f"{one.outcome.whole.calibration.error:.2f}"]
        for one in evaluated
    ]
    blocks = [f"{setting.model}, {setting.source}\n{setting.data}, {size}", _table(headers, rows)]
    if any(len(one.outcome.parts) > 1 for one in evaluated):
        blocks += [_corruption_table(one) for one in evaluated]
    if rows := [
        [WEIGHTS[one.prefix], sub.name, _shown(sub.ratio), *_cells(sub.figures)]
        for one in evaluated
        for sub in one.sub_models
    ]:
        blocks.append(_table(["weights", "sub-model", "ratio", *headers[1:-1]], rows))
    return "\n\n".join(blocks)


def _corruption_table(one: Evaluated) -> str:
    """Top-1 error of each corruption and severity."""
    errors: dict[str, list[float]] = {}
    for name, figures in one.outcome.parts.items():
        errors.setdefault(name.partition("/")[0], []).append(100 - figures["top1"])
    rows = [
        [name, *(f"{error:.2f}" for error in values), f"{sum(values) / len(values):.2f}"]
        for name, values in errors.items()
    ]
    rows.append(["mean", *[""] * 5, f"{mean_corruption_error(one.outcome):.2f}"])
    title = f"top-1 error in %, {WEIGHTS[one.prefix]} weights (not divided by AlexNet's)"
    return f"{title}\n{_table(['corruption', *'12345', 'mean'], rows)}"


def _cells(figures: dict[str, float]) -> list[str]:
    return [
        str(figures["images"]),
        f"{figures['top1']:.3f}",
        f"{figures['top5']:.3f}",
        f"{figures['eval_loss']:.4f}",
    ]


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:g}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
