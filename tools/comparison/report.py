"""Ways of training as Markdown: tables of finished runs, and the report of a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template

from engine import atomic
from engine.errors import writing_errors
from engine.text import markdown_table
from tools.comparison.pictures import draw_differences, draw_panels
from tools.comparison.runs import (
    CONFIDENCE,
    METRICS,
    Way,
    check_comparable,
    differing_keys,
    interval,
    override_text,
    percent,
    read_run,
)
from tools.comparison.study import Study, load_study, plan, train_missing

METRIC = "top1"  # that a study compares


def summary_table(ways: Sequence[Way], metric: str) -> str:
    """A row per way: mean ± standard error over seeds, and the paired difference to the baseline with its interval."""
    beside = {"top5": ("top-5, %", 2), "main_loss": ("training loss", 4), "seconds": ("seconds", 1)}  # with decimals
    beside.pop(metric, None)
    header = ["seeds", f"{METRICS[metric].replace(' accuracy', '')}, %", "difference"]
    header += [title for title, _ in beside.values()]
    rows = [
        [
            len(way.runs),
            f"**{_mean(way, metric, 2)}**",
            difference_text(way, metric) if way.baseline else "baseline",
            *(_mean(way, name, decimals) for name, (_, decimals) in beside.items()),
        ]
        for way in ways
    ]
    if all(way.flops is not None for way in ways):
        header.append("FLOPs")
        for way, row in zip(ways, rows, strict=True):
            row.append(f"{way.flops / (way.baseline or way).flops:.2f}")
    return _table(ways, header, rows)


def caption(has_flops: bool = False) -> str:
    """What the columns of the summary are."""
    flops = " FLOPs are those of all forwards of a run, in parts of the baseline's." if has_flops else ""
    return (
        "Mean ± standard error over seeds, of the last evaluation and the last logged training loss of the main model: "
        "of the runs' last checkpoints, not of their best ones. "
        f"Differences are paired by seed, in points, with their interval of {percent(CONFIDENCE)} (Student's t). "
        f"Seconds depend on the machine and on what runs beside.{flops}"
    )


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


def configuration_lines(ways: Sequence[Way]) -> list[str]:
    """What the configuration of each way has of its own."""
    differing = differing_keys([way.first.config for way in ways])
    lines = []
    for index, way in enumerate(ways):
        own = ", ".join(f"`{override_text(key, values[index])}`" for key, values in differing.items())
        mixed = differing_keys([run.config for run in way.runs.values()])
        lines.append(
            f"- **{way.name}**: {own or 'as the others'}"
            + (f"; its runs differ in {', '.join(f'`{key}`' for key in mixed)}" if mixed else "")
        )
    return lines


def _mean(way: Way, name: str, decimals: int) -> str:
    """Over seeds, with its standard error; one seed has none."""
    values = way.values(name)
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{decimals}f}"


def _table(ways: Sequence[Way], header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A row for each way, after its name; with the names of the configurations where there are several."""
    if len({way.base for way in ways}) == 1:
        return markdown_table(["training", *header], [[way.name, *row] for way, row in zip(ways, rows, strict=True)])
    named = [[way.base, way.name, *row] for way, row in zip(ways, rows, strict=True)]
    return markdown_table(["configuration", "training", *header], named)


def run_study(path: Path, jobs: int) -> list[Path]:
    """Bring a study to its end, and return what was written.

    Args:
        jobs: runs at a time.

    Raises:
        InputError: the study file or a configuration is wrong; nothing was trained then.
        RunError: a run failed. The same call goes on.
    """
    study = load_study(path)
    runs = plan(study, path)
    train_missing(runs, jobs)
    ways: list[Way] = []
    for first in runs[: len(study.configs) * len(study.ways)]:  # those of the first seed
        trained = [read_run(run.folder.path) for run in runs if (run.base, run.way) == (first.base, first.way)]
        baseline = next((way for way in ways if way.base == first.base.stem), None)
        flops = first.flops * trained[0].summary["iterations"] * first.config.train.global_batch
        ways.append(Way(first.way, {run.config.seed: run for run in trained}, baseline, first.base.stem, flops))
    return write_report(study, ways, f"python tools/compare_runs.py --study {path.as_posix()}")


def write_report(study: Study, ways: Sequence[Way], command: str) -> list[Path]:
    """Write the page and its pictures, and return their paths.

    Args:
        ways: all with their FLOPs.
        command: what wrote it.

    Raises:
        InputError: runs of a configuration were not measured on the same images.
        RunError: a file cannot be written.
    """
    baselines = [way for way in ways if not way.baseline]
    for baseline in baselines:
        check_comparable([way for way in ways if way.base == baseline.base])
    page = Path(study.report)
    pictures = {name: page.with_name(f"{page.stem}_{name}.png") for name in ("differences", "accuracy", "loss")}
    draw_differences(ways, METRIC, pictures["differences"])
    draw_panels(ways, METRIC, pictures["accuracy"])
    draw_panels(ways, "main_loss", pictures["loss"])
    seeds = sorted(study.seeds)
    text = Template(Path(__file__).with_suffix(".md").read_text()).substitute(
        title=study.title,
        description=study.description.strip(),
        command=command,
        runs=sum(len(way.runs) for way in ways),
        seeds=f"{len(seeds)} seeds" if len(seeds) > 1 else "seed",
        versions=f"torch {version('torch').partition('+')[0]} and timm {version('timm')}",
        facts="\n".join(map(_about_data, baselines)),
        summary=summary_table(ways, METRIC),
        caption=caption(has_flops=True),
        conclusions=_conclusions(ways),
        samples="\n".join(map(_about_images, baselines)),
        single=_table(
            ways,
            [f"seed {seed}" for seed in seeds],
            [[f"{way.runs[seed].value(METRIC):.2f}" for seed in seeds] for way in ways],
        ),
        changes="\n".join(
            f"- **{way}**: {', '.join(f'`{override}`' for override in overrides) or 'the configuration as it is'}"
            for way, overrides in study.ways.items()
        ),
        **{name: picture.name for name, picture in pictures.items()},
    )
    with writing_errors(page):
        atomic.write_text(page, text)
    return [page, *pictures.values()]


def _conclusions(ways: Sequence[Way]) -> str:
    """Verdicts that hold for all differences together."""
    tried = [way for way in ways if way.baseline]
    confidence = 1 - (1 - CONFIDENCE) / len(tried)  # Bonferroni
    verdicts = {"better than the baseline": "", "worse than the baseline": "", "undecided": ""}
    for way in tried:
        mean, half = interval(way.differences(METRIC).values(), confidence)
        verdict = "better than the baseline" if mean > half else "worse than the baseline"
        name = way.name if len({way.base for way in ways}) == 1 else f"{way.base}, {way.name}"
        verdicts[verdict if abs(mean) > half else "undecided"] += (
            f"\n  - {name}: {difference_text(way, METRIC, confidence)}"
        )
    if len(tried) == 1:
        text = f"There is one comparison, which its interval of {percent(confidence)} decides."
    else:
        text = (
            f"Each of the {len(tried)} intervals above is of {percent(CONFIDENCE)}: a few would miss zero by chance "
            f"although nothing differs. Intervals of {percent(confidence)} (Bonferroni) hold all together with "
            f"{percent(CONFIDENCE)}; by those the ways are"
        )
    return f"{text}\n\n" + "\n".join(f"- **{verdict}**:{names or ' none'}" for verdict, names in verdicts.items())


def _about_data(baseline: Way) -> str:
    """What the runs of a configuration have in common."""
    from engine.data.datasets import build_source  # here: who only compares does not wait for torch

    run = baseline.first
    data = run.config.data
    return (
        f"- **{baseline.base}**: {run.config.model.name} on {data.dataset}, {len(build_source(run.config).train)} "
        f"training images and {run.summary['images']} held-out ones of {data.image_size} x {data.image_size} pixels"
    )


def _about_images(baseline: Way) -> str:
    """How much an accuracy depends on which images were held out, a binomial's standard deviation."""
    images, accuracy = baseline.first.summary["images"], statistics.fmean(baseline.values(METRIC))
    deviation = math.sqrt(accuracy * (100 - accuracy) / images)
    return (
        f"- **{baseline.base}**: one of {images} images is {100 / images:.2f} points; an accuracy of {accuracy:.1f} % "
        f"has a standard deviation of {deviation:.2f} points over samples of {images} images"
    )
