"""A whole study: check everything, train what is missing, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config_file import load_config
from tools.analysis import analyze_configured
from tools.comparison.finished_runs import read_run
from tools.comparison.run_groups import make_way
from tools.comparison.tables import Comparisons
from tools.comparison.ways import Way, check_comparable
from tools.studies.report import write_report
from tools.studies.study import PlannedRun, Variant, errors_at, load_study, planned_runs, variants
from tools.studies.training import train_missing


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
