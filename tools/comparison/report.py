"""A study from its file to its report: tables, pictures, and what can be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

import timm
import torch

from engine import atomic
from engine.config_file import load_config
from engine.data.datasets import build_source
from engine.errors import writing_errors
from tools.analysis import analyze_configured
from tools.comparison.pictures import draw_differences, draw_panels
from tools.comparison.runs import CONFIDENCE, Way, check_comparable, estimate, make_way, paired_difference, read_run
from tools.comparison.study import (
    PlannedRun,
    Study,
    Variant,
    errors_at,
    load_study,
    planned_runs,
    train_missing,
    variants,
)
from tools.comparison.tables import (
    Comparisons,
    caption,
    difference_text,
    percent,
    seeds_table,
    summary_table,
)

METRIC = "top1"
VERDICTS = {1: "better than the baseline", -1: "worse than the baseline", 0: "undecided"}


def run_study(path: Path, jobs: int) -> list[Path]:
    """Bring a study to its end, and return what was written.

    Args:
        jobs: runs at a time.

    Raises:
        InputError: the study file or a configuration is wrong; nothing was trained then.
        RunError: a run failed. The same call goes on.
    """
    study = load_study(path)
    tried = variants(study, path)
    flops = {variant: _flops_per_image(variant, path) for variant in tried}
    runs = planned_runs(study, tried)
    train_missing(runs, jobs)
    comparisons = _compare(runs, flops)
    return write_report(study, comparisons, f"python tools/compare_runs.py --study {path.as_posix()}")


def _flops_per_image(variant: Variant, path: Path) -> int:
    """Multiply-adds of all forwards of a step, per image; what a model or an augmentation refuses is refused here."""
    with errors_at(f"{path}: ways: {variant.way}"):
        complexity = analyze_configured(load_config(variant.config, variant.overrides))
    return complexity.main.flops + complexity.sub_flops


def _compare(runs: Sequence[PlannedRun], flops: dict[Variant, int]) -> Comparisons:
    """Finished runs by configuration and way."""
    comparisons: dict[str, list[Way]] = {}
    for variant, per_image in flops.items():
        way = make_way(variant.way, [read_run(run.folder) for run in runs if run.variant == variant])
        images = way.first.summary["iterations"] * way.first.config.train.global_batch
        comparisons.setdefault(variant.base, []).append(replace(way, flops=per_image * images))
    for ways in comparisons.values():
        check_comparable(ways)
    return comparisons


def write_report(study: Study, comparisons: Comparisons, command: str) -> list[Path]:
    """Write the page and its pictures, and return their paths.

    Args:
        comparisons: by name of the configuration; all ways with their FLOPs.
        command: what wrote it.
    """
    page = Path(study.report)
    pictures = {name: page.with_name(f"{page.stem}_{name}.png") for name in ("differences", "accuracy", "loss")}
    draw_differences(comparisons, METRIC, pictures["differences"])
    draw_panels(comparisons, METRIC, pictures["accuracy"])
    draw_panels(comparisons, "main_loss", pictures["loss"])
    text = Template(Path(__file__).with_suffix(".md").read_text()).substitute(
        title=study.title,
        description=study.description.strip(),
        command=command,
        runs=sum(len(way.runs) for ways in comparisons.values() for way in ways),
        seeds=f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "seed",
        versions=f"torch {torch.__version__.partition('+')[0]} and timm {timm.__version__}",
        facts="\n".join(_facts(name, ways[0]) for name, ways in comparisons.items()),
        summary=summary_table(comparisons, METRIC),
        caption=caption(has_flops=True),
        conclusions=_conclusions(comparisons),
        single=seeds_table(comparisons, METRIC),
        changes="\n".join(f"- **{way}**: {_in_words(overrides)}" for way, overrides in study.ways.items()),
        **{name: picture.name for name, picture in pictures.items()},
    )
    with writing_errors(page):
        atomic.write_text(page, text)
    return [page, *pictures.values()]


def _in_words(overrides: list[str]) -> str:
    return ", ".join(f"`{override}`" for override in overrides) or "the configuration as it is"


def _facts(name: str, baseline: Way) -> str:
    """What the runs of a configuration have in common."""
    run = baseline.first
    data = run.config.data
    return (
        f"- **{name}**: {run.config.model.name} on {data.dataset}, {len(build_source(run.config).train)} training "
        f"images and {run.summary['images']} held-out ones of {data.image_size} x {data.image_size} pixels"
    )


def _conclusions(comparisons: Comparisons) -> str:
    """Verdicts that hold for all comparisons together, and what they leave out."""
    pairs = [(name, ways[0], way) for name, ways in comparisons.items() for way in ways[1:]]
    confidence = 1 - (1 - CONFIDENCE) / len(pairs)  # Bonferroni
    found: dict[int, list[str]] = {sign: [] for sign in VERDICTS}
    for name, baseline, way in pairs:
        title = way.name if len(comparisons) == 1 else f"{name}, {way.name}"
        sign = paired_difference(way, baseline, METRIC, confidence).sign
        found[sign].append(f"{title}: {difference_text(way, baseline, METRIC, confidence)}")
    verdicts = "\n".join(
        "\n  - ".join([f"- **{VERDICTS[sign]}**:{'' if names else ' none'}", *names]) for sign, names in found.items()
    )
    samples = "\n".join(_about_images(name, ways[0]) for name, ways in comparisons.items())
    return f"{_about_many(len(pairs), confidence)}\n\n{verdicts}\n\n{ABOUT_SEEDS}\n\n{samples}"


ABOUT_SEEDS = (
    "The intervals are about seeds: initial weights, order of images, masks. All runs share one split of the data, and "
    "the recipe of their configuration but for what is listed below. What other images would give, they do not say:"
)


def _about_many(pairs: int, confidence: float) -> str:
    if pairs == 1:
        return f"There is one comparison, which its interval of {percent(confidence)} decides."
    return (
        f"Each of the {pairs} intervals above is of {percent(CONFIDENCE)}: a few would miss zero by chance although "
        f"nothing differs. Intervals of {percent(confidence)} (Bonferroni) hold all together with "
        f"{percent(CONFIDENCE)}; by those the ways are"
    )


def _about_images(name: str, baseline: Way) -> str:
    """How much an accuracy depends on which images were held out, a binomial's standard deviation."""
    images, accuracy = baseline.first.summary["images"], estimate(baseline.values(METRIC)).mean
    deviation = math.sqrt(accuracy * (100 - accuracy) / images)
    return (
        f"- **{name}**: one of {images} images is {100 / images:.2f} points; an accuracy of {accuracy:.1f} % has a "
        f"standard deviation of {deviation:.2f} points over samples of {images} images"
    )
