"""A study: ways of training, each tried with several seeds. Its file, its runs, their training, results and report."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from string import Template
from typing import IO, Any, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these at run time)

import torch
from omegaconf import MISSING, OmegaConf
from tqdm import tqdm

from augsub.named_registry import did_you_mean
from engine import atomic
from engine.config import Config, marked, sides
from engine.config_file import differences, fill_in_from, leaves, load_config, read_over, reported
from engine.config_rules import MAY_CHANGE
from engine.data.imagenet_family import CORRUPTED
from engine.data.source import build_source
from engine.defaults import IF_AVAILABLE
from engine.errors import InputError, RunError, first_line, writing_errors
from engine.figure import save
from engine.html_report import write_report
from engine.run_folder import RunFolder
from engine.text import expanded, markdown_table, to_json, with_nan
from tools.analysis import analyze_configured
from tools.comparison import runs as compared
from tools.comparison.pictures import DPI, PICTURES, every_way
from tools.comparison.runs import METRICS, OWN_KEYS, ROBUSTNESS, Run, Way, check_comparable, finished_run, make_ways
from tools.machine import machine

# ruff: noqa: UP006, UP045

TOOLS = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("report.md")
METRIC = "top1"  # that a study compares
LEARNT_WITH = (  # of what a run may change when it is resumed, what makes another result of it
    "model.pretrained",
    "model.checkpoint",
    "augsub.teacher.checkpoint",
    "train.max_iters",
    "train.micro_batch",
    "train.accumulation",
    "train.amp",
    "train.clip_norm",
    "optimizer.lr",
    "ema.*",
    "evaluation.patience",
)
POLL = 0.1  # seconds between looks at the runs
CORRUPTIONS_CAPTION = (
    "Of the last checkpoints, by `tools/eval_net.py`: mean over eight corruptions in five severities. A model whose "
    "confidence is as high as it is right has no calibration error. Differences as above."
)
DRAWN = ("epoch", "main_loss", "sub_loss", "main_grad_norm", "sub_grad_norm", *METRICS)  # of a run's records
DIGITS = 5  # significant ones of what is drawn


@dataclass
class Study:
    """What a study file says."""

    title: str = MISSING  # of the report
    description: str = ""  # the report's first paragraph
    configs: List[str] = MISSING  # configurations that every way starts from, relative to the study file
    seeds: List[int] = MISSING  # the same for all ways: differences are paired
    ways: Dict[str, List[str]] = field(default_factory=dict)  # name: key=value overrides; the first one is the baseline
    against: Dict[str, str] = field(default_factory=dict)  # ways, and what else they are compared with
    corruptions: bool = False  # whether last checkpoints are evaluated under corruptions too
    report: str = MISSING  # the Markdown file to write; its pictures lie beside it
    results: Optional[str] = None  # where studies share runs of the same name; null: beside the report
    output_dir: Optional[str] = None  # of the runs' folders; null: runs/<name of the study file>


@dataclass(frozen=True)
class PlannedRun:
    """One way of training of one configuration (the file `base` with `overrides`), with one seed.

    Attributes:
        flops: multiply-adds of all forwards of a step, per image.
        corruptions: whether its last checkpoint is evaluated under corruptions too.
    """

    base: Path
    way: str
    overrides: list[str]
    config: Config
    flops: int
    corruptions: bool

    @property
    def name(self) -> str:
        """That of its folder."""
        return Path(self.config.output_dir).name

    @property
    def group(self) -> tuple[Path, int]:
        """What it is compared with: the same configuration with the same seed."""
        return self.base, self.config.seed

    @property
    def commands(self) -> list[list[str | Path]]:
        """What Python has yet to run, one after the other; what was interrupted goes on."""
        folder = RunFolder(self.config.output_dir)
        train = [TOOLS / "train_net.py", "--resume", "--config", self.base, *self.overrides]
        evaluate = [[TOOLS / "eval_net.py", folder.last, *asked] for asked in ((), ("--variant", CORRUPTED))]
        return [*([train] if finished_run(folder.path) is None else ()), *(evaluate if self.corruptions else ())]

    @property
    def finished(self) -> Run | None:
        """What it came to; None if it is not at its end."""
        done = finished_run(self.config.output_dir)
        return done if done is not None and self.is_told_by(done.summary) else None

    def is_told_by(self, summary: Mapping[str, Any]) -> bool:
        """Whether a summary has all figures that the study is about."""
        return not self.corruptions or summary.keys() >= ROBUSTNESS.keys()


def load_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        InputError: missing or malformed file, unknown or missing key, wrong type, or nothing to try.
    """
    content = read_over(Study, path)
    with reported(str(path)):
        study: Study = OmegaConf.to_object(content)
    study.output_dir = expanded(study.output_dir or f"runs/{path.stem}")
    study.results = expanded(study.results or str(Path(study.report).with_suffix(".jsonl")))
    study.report, study.configs = expanded(study.report), [expanded(config) for config in study.configs]
    for name in (*study.against, *study.against.values()):
        if name not in study.ways:
            raise InputError(f"{path}: against: {name} is none of the ways{did_you_mean(name, study.ways)}")
    if not study.configs or not study.seeds or len(study.ways) < 2:
        raise InputError(f"{path}: needs one of configs and of seeds, and two ways or more, the baseline first")
    return study


def plan(study: Study, path: Path, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """All runs of the study in a file, the first seed of everything before the second one of anything.

    Args:
        overrides: key=value for all of them, where the data are for example.

    Raises:
        InputError: a configuration is missing, it or its model refuses a seed or what a way overrides, or two runs
            would have one folder.
    """
    runs: dict[str, PlannedRun] = {}  # by folder
    for base, way in product([path.parent / config for config in study.configs], study.ways):
        name = re.sub(r"[^\w.]+", "_", way).strip("_").lower()
        try:
            cost = analyze_configured(load_config(base, [*study.ways[way], *overrides]))
            for seed in study.seeds:
                folder = f"{study.output_dir}/{base.stem}_{name}_seed{seed}"
                if folder in runs:
                    raise InputError(f"{folder} would be the folder of two runs")
                own = [*study.ways[way], *overrides, f"seed={seed}", f"output_dir={folder}"]
                runs[folder] = PlannedRun(
                    base, way, own, load_config(base, own), cost.training_flops, study.corruptions
                )
        except InputError as error:
            raise InputError(f"{path}: ways: {way}: {error}") from error
    return sorted(runs.values(), key=lambda run: study.seeds.index(run.config.seed))


def settings(config: Config) -> dict[str, Any]:
    """Keys whose values are not the defaults, but for seed and folder, and for what says where and how fast."""
    left_out = {*OWN_KEYS, *marked(MAY_CHANGE)}.difference(LEARNT_WITH)
    return {
        key: value
        for key, (value, _) in differences(config, Config()).items()
        if not any(fnmatch(key, pattern) for pattern in left_out)
    }


def changed(trained: Mapping[str, Any], planned: Config) -> str:
    """The first setting of a run that is not the planned one, with both values; "" if all are."""
    expected, usual = settings(planned), leaves(Config())
    for key in [*expected, *(key for key in trained if key not in expected)]:
        was, wanted = (values.get(key, usual.get(key)) for values in (trained, expected))
        if was != wanted and wanted != IF_AVAILABLE:  # which becomes false where it is not
            return f"{key} = {was}, the study says {wanted}"
    return ""


def refuse_another_folder(run: PlannedRun) -> None:
    """Raise InputError if the folder of a run holds another one."""
    folder = RunFolder(run.config.output_dir)
    if folder.config.exists():
        trained, planned = load_config(folder.config), load_config(run.base, run.overrides)
        fill_in_from(planned, trained)
        if difference := changed(settings(trained), planned):
            raise InputError(
                f"{run.config.output_dir}: was trained with {difference}: "
                "remove the folder to train it anew, or give the study another output_dir"
            )


def refuse_other_images(
    run: PlannedRun, checksum: str | None, runs: Sequence[PlannedRun], results: Sequence[Run], file: Path
) -> None:
    """Raise InputError if the held-out images of a run are not those of the results of its configuration.

    Args:
        checksum: of the run's images.
        runs: all that are planned.
        results: in the file.
    """
    names = {other.name for other in runs if other.base == run.base}
    before = {compared.held_out_checksum(result) for result in results if result.path.name in names} - {None}
    if checksum is not None and before - {checksum}:
        raise InputError(
            f"{file}: its results of {run.base.stem} are of other held-out images, by names or labels: give the study "
            "another file of results"
        )


def this_machine() -> str:
    """The machine, in one line."""
    return "{device}, {cores} cores, torch {torch}, timm {timm}".format(**machine(torch.cuda.is_available()))


def read_results(file: Path, runs: Sequence[PlannedRun]) -> list[Run]:
    """Those of the runs of which a results file has a line; none if there is no file.

    Lines of runs that were trained otherwise stay in the file, and are told; of a run's lines from one machine the last
    one counts, which may have been evaluated under corruptions since.

    Raises:
        InputError: a line is none of a result.
    """
    planned, others = {run.name: run for run in runs}, []
    results: dict[tuple[str, str], Run] = {}  # by run and machine
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), start=1):
        try:
            said = json.loads(line)
            name, trained, summary = said.pop("run"), said.pop("settings"), with_nan(said.pop("summary"))
            if name not in planned:
                continue
            if difference := changed(trained, planned[name].config):
                others.append(f"{name} with {difference}")
            elif planned[name].is_told_by(summary):
                results[name, said["machine"]] = Run(Path(name), planned[name].config, summary, **said)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file}, line {number}: {first_line(error)}") from error
    if others:
        print(f"{file}: {len(others)} runs were trained otherwise and do not count: {others[0]}", file=sys.stderr)
    return [*results.values()]


def add_result(file: Path, run: PlannedRun, done: Run) -> Run:
    """Write one more line, for a run that was finished here, and return what it says.

    Whatever happens, the file is the old or the new one.
    """
    records = [{key: float(f"{line[key]:.{DIGITS}g}") for key in DRAWN if key in line} for line in done.records]
    images = len(build_source(run.config).train)
    line = {
        "run": run.name,
        "machine": this_machine(),
        "training_images": images,
        "settings": settings(run.config),
        "summary": done.summary,
        "records": records,
    }
    before = file.read_text() if file.exists() else ""
    with writing_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, f"{before}{to_json(line)}\n")
    return Run(Path(run.name), run.config, done.summary, records, this_machine(), images)


def chosen_machines(runs: Sequence[PlannedRun], results: Sequence[Run]) -> dict[tuple[Path, int], tuple[str, int]]:
    """By group of runs that are compared the machine that has most of them, and how many: never runs of two."""
    groups = {run.name: run.group for run in runs}
    counts = Counter((groups[result.path.name], result.machine) for result in results)
    return {group: (name, count) for (group, name), count in reversed(counts.most_common())}


def missing_runs(runs: Sequence[PlannedRun], results: Sequence[Run]) -> list[PlannedRun]:
    """Runs without a result; where one machine has all runs of a seed, no other one needs them."""
    needed, here = Counter(run.group for run in runs), this_machine()
    complete = {group for group, (_, count) in chosen_machines(runs, results).items() if count == needed[group]}
    have = {result.path.name for result in results if result.machine == here}
    return [run for run in runs if run.group not in complete and run.name not in have]


def train(runs: Sequence[PlannedRun], jobs: int, seconds: float, finished: Callable[[PlannedRun, Run], None]) -> None:
    """Start or continue every run, each in a process with one thread, and hand over those that reach their end.

    Args:
        jobs: runs at a time.
        seconds: after which those that still run save their state and end.

    Raises:
        RunError: a run failed; after this, and after Ctrl-C, those beside it have saved their state and ended.
    """
    waiting, deadline = [(run, run.commands) for run in runs], time.monotonic() + seconds
    processes: dict[subprocess.Popen, tuple[PlannedRun, list[list[str | Path]], IO[str]]] = {}
    try:
        with tqdm(total=len(runs), unit="run", disable=None) as bar:
            while (waiting or processes) and time.monotonic() < deadline:
                while waiting and len(processes) < jobs:
                    run, (command, *later) = waiting.pop(0)
                    said = tempfile.TemporaryFile("w+", errors="backslashreplace")  # noqa: SIM115
                    process = subprocess.Popen(
                        [sys.executable, *command],
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        start_new_session=True,  # Ctrl-C reaches this process alone, which asks them to save and stop
                        stdout=subprocess.DEVNULL,
                        stderr=said,
                    )
                    processes[process] = run, later, said
                time.sleep(POLL)
                for process in [process for process in processes if process.poll() is not None]:
                    run, later, said = processes.pop(process)
                    if not process.returncode and later:
                        waiting.insert(0, (run, later))
                        continue
                    said.seek(0)
                    done = None if process.returncode else run.finished
                    if done is None:
                        reason = (said.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                        raise RunError(f"{run.config.output_dir}: {reason.removeprefix('error: ')}")
                    finished(run, done)
                    bar.update()
                    if bar.disable:
                        print(f"{run.config.output_dir}: finished", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.terminate()
        for process, (run, *_) in processes.items():
            process.wait()
            if (done := run.finished) is not None:  # it had come to its end meanwhile
                finished(run, done)


def run_study(
    path: Path, jobs: int, overrides: Sequence[str] = (), seconds: float = math.inf
) -> tuple[list[Path], list[PlannedRun]]:
    """Bring a study forward, and return what was written, the page and its pictures, and the runs that are left.

    Args:
        jobs: runs at a time.
        overrides: key=value for all runs.
        seconds: after which no run goes on.

    Raises:
        InputError: the study file or a configuration is wrong, or a folder is that of another run than the planned
            one; nothing was trained then.
        RunError: a run failed. The same call goes on.
    """
    study = load_study(path)
    runs, file = plan(study, path, overrides), Path(study.results)
    results = read_results(file, runs)

    def keep(run: PlannedRun, done: Run) -> None:
        results.append(add_result(file, run, done))

    for run in missing_runs(runs, results):
        refuse_another_folder(run)
        if (done := run.finished) is not None:
            refuse_other_images(run, compared.held_out_checksum(done), runs, results, file)
            keep(run, done)
    for run in {run.base: run for run in missing_runs(runs, results)}.values() if seconds else ():
        own = build_source(run.config, with_training=False).facts["fingerprints"]["held-out"]["sha256"]
        refuse_other_images(run, own, runs, results, file)
    train(missing_runs(runs, results), jobs, seconds, keep)
    left = missing_runs(runs, results)
    ways = found_ways(study, runs, results)
    command = shlex.join(["python", "tools/compare_runs.py", "--study", path.as_posix(), *overrides])
    is_comparable = any(way.baseline for of_config in ways.values() for way in of_config)
    return write_page(study, ways, len(left), command) if is_comparable else [], left


def found_ways(study: Study, runs: Sequence[PlannedRun], results: Sequence[Run]) -> dict[str, list[Way]]:
    """By configuration the ways of training of which there are results, those of a seed from one machine.

    Runs without that of their baseline are left out.
    """
    machines, groups = chosen_machines(runs, results), {run.name: run.group for run in runs}
    found = {run.path.name: run for run in results if machines[groups[run.path.name]][0] == run.machine}
    ways: dict[str, list[Way]] = {}
    for base in dict.fromkeys(run.base for run in runs):
        prefix = f"{base.stem}, " if len(study.configs) > 1 else ""
        there = [run for run in runs if run.base == base and run.name in found]
        seeds = {run.config.seed for run in there if run.way == next(iter(study.ways))}
        of_ways = {way: [run for run in there if run.way == way and run.config.seed in seeds] for way in study.ways}
        tried = {way: of_one for way, of_one in of_ways.items() if of_one}
        if not tried:
            continue
        ways[base.stem] = make_ways(
            (prefix + way, [found[run.name] for run in of_one]) for way, of_one in tried.items()
        )
        for way, of_one in zip(ways[base.stem], tried.values(), strict=True):
            way.flops = of_one[0].flops * way.first.summary["epochs"] * way.first.training_images
    return ways


def write_page(study: Study, by_config: Mapping[str, list[Way]], left: int, command: str) -> list[Path]:
    """Draw the pictures, write the page that shows them and the report; all of them are returned."""
    page = Path(study.report)
    for ways in filter(lambda ways: len(ways) > 1, by_config.values()):
        check_comparable(ways, METRIC)
    drawn = {f"{page.stem}_{name}.png": draw(by_config, METRIC) for name, (_, draw) in PICTURES.items()}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    captions = {name: caption for name, (caption, _) in zip(drawn, PICTURES.values(), strict=True) if name in figures}
    for name, figure in figures.items():
        save(figure, page.with_name(name), DPI)
    text = fill_page(study, by_config, captions, left, command)
    with writing_errors(page):
        atomic.write_text(page, text)
    report = Path(study.output_dir) / f"{page.stem}.html"  # studies may share the folder
    write_report(report, text, figures)
    return [page, *map(page.with_name, figures), report]


def fill_page(
    study: Study, by_config: Mapping[str, list[Way]], pictures: Mapping[str, str], left: int, command: str
) -> str:
    """The page.

    Args:
        pictures: their captions, by name.
    """
    facts, samples, ways = [], [], every_way(by_config)
    for base, (baseline, *_) in by_config.items():
        run, accuracy = baseline.first, statistics.fmean(baseline.values(METRIC))
        data, images = run.config.data, run.summary["images"]
        facts.append(
            f"- **{base}**: {run.config.model.name} on {data.dataset}, {run.training_images} training "
            f"images and {images} held-out ones of {' x '.join(map(str, sides(data.image_size)))} pixels"
        )
        deviation = math.sqrt(accuracy * (100 - accuracy) / images)  # a binomial's
        samples.append(
            f"- **{base}**: one of {images} images is {100 / images:.2f} points; an accuracy of {accuracy:.1f} % "
            f"has a standard deviation of {deviation:.2f} points over samples of {images} images"
        )
    seeds = sorted({seed for way in ways for seed in way.runs})
    where: dict[str, set[int]] = {}
    for way in ways:
        for seed, run in way.runs.items():
            where.setdefault(run.machine, set()).add(seed)
    count, robustness = sum(len(way.runs) for way in ways), compared.robustness_tables(ways, METRIC)
    return Template(PAGE.read_text()).substitute(
        title=study.title,
        description=study.description.strip(),
        command=command,
        runs=f"{count} runs" if not left else f"{count} runs so far ({left} are still to come)",
        machines="\n".join(f"- seed {', '.join(map(str, sorted(of_one)))}: {name}" for name, of_one in where.items()),
        facts="\n".join(facts),
        summary=compared.summary_table(ways, METRIC),
        robustness=robustness and f"\n\n## Under corruptions\n\n{robustness}\n\n{CORRUPTIONS_CAPTION}",
        caption=compared.CAPTION,
        conclusions=compared.conclusions(ways, METRIC),
        equal=compared.equal_computation(ways, METRIC) + compared.contrasts(ways, study.against, METRIC),
        samples="\n".join(samples),
        single=markdown_table(
            ["training", *(f"seed {seed}" for seed in seeds)],
            [
                [way.name, *(f"{way.runs[seed].summary[METRIC]:.2f}" if seed in way.runs else "" for seed in seeds)]
                for way in ways
            ],
        ),
        changes="\n".join(
            f"- **{way}**: {', '.join(f'`{override}`' for override in overrides) or 'the configuration as it is'}"
            for way, overrides in study.ways.items()
        ),
        pictures="\n\n".join(f"![{caption}]({name})" for name, caption in pictures.items()),
    )
