"""Ways of training as Markdown: means and differences, every single run, and what was changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.text import markdown_table
from tools.comparison.runs import CONFIDENCE, Estimate, Way, differing_keys, estimate, override_text, paired_difference

METRICS = {
    "top1": "top-1, %",
    "top5": "top-5, %",
    "ema_top1": "top-1 of the EMA, %",
    "ema_top5": "top-5 of the EMA, %",
}  # accuracies on held-out images, in percent
BESIDE = {"top5": "top-5, %", "main_loss": "training loss", "seconds": "seconds"}  # after the metric, with decimals
DECIMALS = {"main_loss": 4, "seconds": 1}  # of all others: 2
Comparisons = Mapping[str, Sequence[Way]]  # by title, the baseline first; a single one needs no title


def summary_table(comparisons: Comparisons, metric: str) -> str:
    """A row per way: mean ± standard error over seeds, and the paired difference to the baseline with its interval."""
    beside = {name: title for name, title in BESIDE.items() if name != metric}
    has_flops = all(way.flops is not None for ways in comparisons.values() for way in ways)
    header = ["training", "seeds", METRICS[metric], "difference", *beside.values(), *(["FLOPs"] if has_flops else [])]
    rows = {
        title: [
            [
                way.name,
                len(way.runs),
                f"**{_estimate(way, metric)}**",
                "baseline" if way is ways[0] else difference_text(way, ways[0], metric),
                *(_estimate(way, name) for name in beside),
                *([f"{way.flops / ways[0].flops:.2f}"] if has_flops else []),
            ]
            for way in ways
        ]
        for title, ways in comparisons.items()
    }
    return _table(header, rows)


def caption(has_flops: bool = False) -> str:
    """What the columns of the summary are."""
    flops = " FLOPs are those of all forwards of a run, in parts of the baseline's." if has_flops else ""
    return (
        "Mean ± standard error over seeds, of the last evaluation and the last logged training loss of the main model: "
        "of the runs' last checkpoints, not of their best ones. "
        f"Differences are paired by seed, in points, with their interval of {percent(CONFIDENCE)} (Student's t). "
        f"Seconds depend on the machine and on what runs beside.{flops}"
    )


def percent(share: float) -> str:
    """`95 %` for 0.95."""
    return f"{100 * share:.4g} %"


def seeds_table(comparisons: Comparisons, metric: str) -> str:
    """A row per way, a column per seed."""
    seeds = sorted({seed for ways in comparisons.values() for way in ways for seed in way.runs})
    rows = {
        title: [
            [way.name, *(f"{way.runs[seed].value(metric):.2f}" if seed in way.runs else "-" for seed in seeds)]
            for way in ways
        ]
        for title, ways in comparisons.items()
    }
    return _table(["training", *(f"seed {seed}" for seed in seeds)], rows)


def difference_text(way: Way, baseline: Way, metric: str, confidence: float = CONFIDENCE) -> str:
    """`+3.82 [+2.12, +5.52]`, or why there is no interval."""
    difference = paired_difference(way, baseline, metric, confidence)
    if not difference.by_seed:
        return "no seed in common"
    mean = f"{difference.mean:+.2f}"
    if difference.half_width is None:
        return f"{mean} (one seed: no interval)"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    is_partial = len(difference.by_seed) < max(len(way.runs), len(baseline.runs))
    common = f" over seeds {', '.join(map(str, difference.by_seed))}" if is_partial else ""
    return f"{mean} [{low:+.2f}, {high:+.2f}]{common}"


def configuration_lines(ways: Sequence[Way]) -> list[str]:
    """What the configuration of each way has of its own."""
    differing = differing_keys([way.first for way in ways])
    lines = []
    for index, way in enumerate(ways):
        own = ", ".join(f"`{override_text(key, values[index])}`" for key, values in differing.items())
        mixed = differing_keys(list(way.runs.values()))
        lines.append(
            f"- **{way.name}**: {own or 'as the others'}"
            + (f"; its runs differ in {', '.join(f'`{key}`' for key in mixed)}" if mixed else "")
        )
    return lines


def _estimate(way: Way, name: str) -> str:
    decimals = DECIMALS.get(name, 2)
    value: Estimate = estimate(way.values(name))
    return f"{value.mean:.{decimals}f}" + (f" ± {value.error:.{decimals}f}" if value.error is not None else "")


def _table(header: Sequence[str], rows: Mapping[str, Iterable[Sequence[object]]]) -> str:
    """Rows under their titles; without a column of titles where there is one title only."""
    if len(rows) > 1:
        header = ["configuration", *header]
        body = [[title, *row] for title, group in rows.items() for row in group]
    else:
        body = [row for group in rows.values() for row in group]
    return markdown_table(header, body)
