"""A study: ways of training, each tried with several seeds. Its file, its runs, their training, its report."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from string import Template
from typing import IO, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these at run time)

from omegaconf import MISSING, OmegaConf
from tqdm import tqdm

from engine import atomic
from engine.config import Config
from engine.config_file import differences, fill_in_from, load_config, read_over, reported
from engine.data.datasets import build_source
from engine.defaults import IF_AVAILABLE
from engine.errors import InputError, RunError, writing_errors
from engine.run_folder import RunFolder
from engine.text import expanded, markdown_table
from tools.analysis import analyze_configured
from tools.comparison import runs as compared
from tools.comparison.pictures import draw_differences, draw_panels
from tools.comparison.runs import Way, check_comparable, finished_run, make_ways

# ruff: noqa: UP006, UP045

TRAIN_NET = Path(__file__).parents[1] / "train_net.py"
PAGE = Path(__file__).with_name("report.md")
METRIC = "top1"  # that a study compares
POLL = 0.1  # seconds between looks at the runs


@dataclass
class Study:
    """What a study file says."""

    title: str = MISSING  # of the report
    description: str = ""  # the report's first paragraph
    configs: List[str] = MISSING  # configurations that every way starts from, relative to the study file
    seeds: List[int] = MISSING  # the same for all ways: differences are paired
    ways: Dict[str, List[str]] = field(default_factory=dict)  # name: key=value overrides; the first one is the baseline
    report: str = MISSING  # the Markdown file to write; its pictures lie beside it
    output_dir: Optional[str] = None  # of the runs' folders; null: runs/<name of the study file>


@dataclass(frozen=True)
class PlannedRun:
    """One way of training of one configuration (the file `base` with `overrides`), with one seed.

    Attributes:
        flops: multiply-adds of all forwards of a step, per image.
    """

    base: Path
    way: str
    overrides: list[str]
    config: Config
    flops: int


def load_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        InputError: missing or malformed file, unknown or missing key, wrong type, or nothing to try.
    """
    content = read_over(Study, path)
    with reported(str(path)):
        study: Study = OmegaConf.to_object(content)
    study.output_dir = expanded(study.output_dir or f"runs/{path.stem}")
    study.report, study.configs = expanded(study.report), [expanded(config) for config in study.configs]
    if not study.configs or not study.seeds or len(study.ways) < 2:
        raise InputError(f"{path}: needs one of configs and of seeds, and two ways or more, the baseline first")
    return study


def plan(study: Study, path: Path) -> list[PlannedRun]:
    """All runs of the study in a file, the first seed of everything before the second one of anything.

    Raises:
        InputError: a configuration is missing, it or its model refuses a seed or what a way overrides, or two runs
            would have one folder.
    """
    runs: dict[str, PlannedRun] = {}  # by folder
    for base, way in product([path.parent / config for config in study.configs], study.ways):
        name = re.sub(r"[^\w.]+", "_", way).strip("_").lower()
        try:
            cost = analyze_configured(load_config(base, study.ways[way]))
            for seed in study.seeds:
                folder = f"{study.output_dir}/{base.stem}_{name}_seed{seed}"
                if folder in runs:
                    raise InputError(f"{folder} would be the folder of two runs")
                overrides = [*study.ways[way], f"seed={seed}", f"output_dir={folder}"]
                config = load_config(base, overrides)
                runs[folder] = PlannedRun(base, way, overrides, config, cost.training_flops)
        except InputError as error:
            raise InputError(f"{path}: ways: {way}: {error}") from error
    return sorted(runs.values(), key=lambda run: study.seeds.index(run.config.seed))


def train_missing(runs: Sequence[PlannedRun], jobs: int) -> None:
    """Start or continue every run that is not finished, each in a process with one thread.

    Raises:
        InputError: a folder holds another run than the planned one.
        RunError: a run failed; after this, and after Ctrl-C, those beside it have saved their state and ended.
    """
    for run in runs:
        _refuse_another(run)
    waiting = [run for run in runs if finished_run(run.config.output_dir) is None]
    processes: dict[subprocess.Popen, tuple[PlannedRun, IO[str]]] = {}
    try:
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=None) as bar:
            while waiting or processes:
                while waiting and len(processes) < jobs:
                    run, said = waiting.pop(0), tempfile.TemporaryFile("w+", errors="backslashreplace")  # noqa: SIM115
                    process = subprocess.Popen(
                        [sys.executable, TRAIN_NET, "--resume", "--config", run.base, *run.overrides],
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        start_new_session=True,  # Ctrl-C reaches this process alone, which asks them to save and stop
                        stdout=subprocess.DEVNULL,
                        stderr=said,
                    )
                    processes[process] = run, said
                time.sleep(POLL)
                for process in [process for process in processes if process.poll() is not None]:
                    run, said = processes.pop(process)
                    said.seek(0)
                    if process.returncode:
                        reason = (said.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                        raise RunError(f"{run.config.output_dir}: {reason.removeprefix('error: ')}")
                    bar.update()
                    if bar.disable:
                        print(f"{run.config.output_dir}: finished", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _refuse_another(run: PlannedRun) -> None:
    config = RunFolder(run.config.output_dir).config
    if not config.exists():
        return
    study, run_as_trained = load_config(run.base, run.overrides), load_config(config)
    fill_in_from(study, run_as_trained)
    for key, (planned, trained) in differences(study, run_as_trained).items():
        if key != "output_dir" and planned != IF_AVAILABLE:  # which becomes false where it is not
            raise InputError(
                f"{run.config.output_dir}: was trained with {key} = {trained}, the study says {planned}: "
                "remove the folder to train it anew, or give the study another output_dir"
            )


def run_study(path: Path, jobs: int) -> list[Path]:
    """Bring a study to its end, and return what was written: the page and its pictures.

    Args:
        jobs: runs at a time.

    Raises:
        InputError: the study file or a configuration is wrong; nothing was trained then.
        RunError: a run failed. The same call goes on.
    """
    study = load_study(path)
    runs = plan(study, path)
    train_missing(runs, jobs)
    baselines: dict[str, Way] = {}  # by name of the configuration
    ways: list[Way] = []
    for base in dict.fromkeys(run.base for run in runs):
        of_base = [run for run in runs if run.base == base]
        prefix = f"{base.stem}, " if len(study.configs) > 1 else ""
        found = make_ways(
            (prefix + way, [finished_run(run.config.output_dir) for run in of_base if run.way == way])
            for way in study.ways
        )
        check_comparable(found, METRIC)
        flops = {prefix + run.way: run.flops for run in of_base}
        for way in found:
            way.flops = flops[way.name] * way.first.summary["iterations"] * way.first.config.train.global_batch
        baselines[base.stem] = found[0]
        ways += found
    page = Path(study.report)
    pictures = {name: page.with_name(f"{page.stem}_{name}.png") for name in ("differences", "accuracy", "loss")}
    draw_differences(ways, METRIC, pictures["differences"])
    draw_panels(ways, METRIC, pictures["accuracy"])
    draw_panels(ways, "main_loss", pictures["loss"])
    text = fill_page(study, ways, baselines, pictures, f"python tools/compare_runs.py --study {path.as_posix()}")
    with writing_errors(page):
        atomic.write_text(page, text)
    return [page, *pictures.values()]


def fill_page(
    study: Study, ways: Sequence[Way], baselines: Mapping[str, Way], pictures: Mapping[str, Path], command: str
) -> str:
    """The report."""
    facts, samples = [], []
    for base, baseline in baselines.items():
        run, accuracy = baseline.first, statistics.fmean(baseline.values(METRIC))
        data, images = run.config.data, run.summary["images"]
        facts.append(
            f"- **{base}**: {run.config.model.name} on {data.dataset}, {len(build_source(run.config).train)} training "
            f"images and {images} held-out ones of {data.image_size} x {data.image_size} pixels"
        )
        deviation = math.sqrt(accuracy * (100 - accuracy) / images)  # a binomial's
        samples.append(
            f"- **{base}**: one of {images} images is {100 / images:.2f} points; an accuracy of {accuracy:.1f} % "
            f"has a standard deviation of {deviation:.2f} points over samples of {images} images"
        )
    seeds = sorted(study.seeds)
    return Template(PAGE.read_text()).substitute(
        title=study.title,
        description=study.description.strip(),
        command=command,
        runs=len(ways) * len(seeds),
        seeds=f"{len(seeds)} seeds" if len(seeds) > 1 else "seed",
        versions=f"torch {version('torch').partition('+')[0]} and timm {version('timm')}",
        facts="\n".join(facts),
        summary=compared.summary_table(ways, METRIC),
        caption=compared.CAPTION,
        conclusions=compared.conclusions(ways, METRIC),
        samples="\n".join(samples),
        single=markdown_table(
            ["training", *(f"seed {seed}" for seed in seeds)],
            [[way.name, *(f"{accuracy:.2f}" for accuracy in way.values(METRIC))] for way in ways],
        ),
        changes="\n".join(
            f"- **{way}**: {', '.join(f'`{override}`' for override in overrides) or 'the configuration as it is'}"
            for way, overrides in study.ways.items()
        ),
        **{name: picture.name for name, picture in pictures.items()},
    )
