"""Ways of training as Markdown: tables of finished runs, and what can be concluded from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy import stats

from engine.text import markdown_table
from tools.comparison.runs import CONFIDENCE, METRICS, Way, differing_keys, interval, override_text

CAPTION = (
    "Mean ± standard error over seeds, of the last evaluation and the last logged training loss of the main model: "
    "of the runs' last checkpoints, not of their best ones. "
    "Differences are paired by seed, in points, with their interval of 95 % (Student's t). "
    "Seconds depend on the machine and on what runs beside."
)
BESIDE = {"top5": ("top-5, %", 2), "main_loss": ("training loss", 4), "seconds": ("seconds", 1)}  # with decimals


def summary_table(ways: Sequence[Way], metric: str) -> str:
    """A row per way: mean ± standard error over seeds, and the paired difference to the baseline with its interval."""
    beside = {name: column for name, column in BESIDE.items() if name != metric}
    header = ["seeds", f"{METRICS[metric].replace(' accuracy', '')}, %", "difference"]
    header += [*(title for title, _ in beside.values()), *(["FLOPs"] if ways[0].flops else [])]
    rows = [
        [
            len(way.runs),
            f"**{_mean(way, metric, 2)}**",
            difference_text(way, metric) if way.baseline else "baseline",
            *(_mean(way, name, decimals) for name, (_, decimals) in beside.items()),
            *([f"{way.flops / (way.baseline or way).flops:.2f}"] if way.flops else []),
        ]
        for way in ways
    ]
    return table(ways, header, rows)


def table(ways: Sequence[Way], header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A row for each way, after its name; with the names of the configurations where there are several."""
    if not ways[0].base:
        return markdown_table(["training", *header], [[way.name, *row] for way, row in zip(ways, rows, strict=True)])
    named = [[way.base, way.name, *row] for way, row in zip(ways, rows, strict=True)]
    return markdown_table(["configuration", "training", *header], named)


def _mean(way: Way, name: str, decimals: int) -> str:
    """Over seeds, with its standard error; one seed has none."""
    values = way.values(name)
    error = f" ± {stats.sem(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{error}"


def difference_text(way: Way, metric: str, confidence: float = CONFIDENCE) -> str:
    """`+3.82 [+2.12, +5.52]`, or why there is no interval."""
    by_seed = way.differences(metric)
    if not by_seed:
        return "no seed in common"
    mean, half = interval(by_seed.values(), confidence)
    if len(by_seed) == 1:
        return f"{mean:+.2f} (one seed: no interval)"
    is_partial = len(by_seed) < max(len(way.runs), len(way.baseline.runs))
    common = f" over seeds {', '.join(map(str, by_seed))}" if is_partial else ""
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]{common}"


def configuration_lines(ways: Sequence[Way]) -> str:
    """What the configuration of each way has of its own."""
    differing = differing_keys([way.first.config for way in ways])
    lines = []
    for index, way in enumerate(ways):
        own = ", ".join(f"`{override_text(key, values[index])}`" for key, values in differing.items())
        mixed = ", ".join(f"`{key}`" for key in differing_keys([run.config for run in way.runs.values()]))
        lines.append(f"- **{way.name}**: {own or 'as the others'}{mixed and f'; its runs differ in {mixed}'}")
    return "\n".join(lines)


def conclusions(ways: Sequence[Way], metric: str) -> str:
    """Verdicts that hold for all differences together."""
    tried = [way for way in ways if way.baseline]
    confidence = 1 - (1 - CONFIDENCE) / len(tried)  # Bonferroni
    verdicts = {"better than the baseline": "", "worse than the baseline": "", "undecided": ""}
    for way in tried:
        mean, half = interval(way.differences(metric).values(), confidence)
        verdict = "better than the baseline" if mean > half else "worse than the baseline"
        verdicts[verdict if abs(mean) > half else "undecided"] += (
            f"\n  - {way.title}: {difference_text(way, metric, confidence)}"
        )
    text = f"There is one comparison, which its interval of {100 * confidence:.4g} % decides."
    if len(tried) > 1:
        text = (
            f"Each of the {len(tried)} intervals above is of 95 %: a few would miss zero by chance "
            f"although nothing differs. Intervals of {100 * confidence:.4g} % (Bonferroni) hold all together with "
            "95 %; by those the ways are"
        )
    return f"{text}\n\n" + "\n".join(f"- **{verdict}**:{names or ' none'}" for verdict, names in verdicts.items())
