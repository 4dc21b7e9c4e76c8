"""A study: ways of training, each tried with several seeds. Its file, the runs that follow from it, their training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional  # noqa: UP035  (OmegaConf reads these at run time)

from omegaconf import MISSING, OmegaConf
from tqdm import tqdm

from engine.config import Config
from engine.config_file import differences, fill_in_from, load_config, read_over, reported
from engine.defaults import IF_AVAILABLE
from engine.errors import InputError, RunError
from engine.run_folder import RunFolder
from engine.text import expanded
from tools.comparison.runs import OWN_KEYS, refuse_if_written, why_unfinished

# ruff: noqa: UP006, UP045

TRAIN_NET = Path(__file__).parents[1] / "train_net.py"


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
class Variant:
    """One way of training of one configuration, for any seed."""

    config: Path
    way: str
    overrides: tuple[str, ...]
    folder: Path  # of its runs, but for the seed

    @property
    def base(self) -> str:
        """Name of the configuration."""
        return self.config.stem


@dataclass(frozen=True)
class PlannedRun:
    """A variant with a seed."""

    variant: Variant
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return self.variant.folder.with_name(f"{self.variant.folder.name}_seed{self.seed}")

    @property
    def overrides(self) -> list[str]:
        """All that the run changes in the configuration."""
        return [*self.variant.overrides, f"seed={self.seed}", f"output_dir={self.folder}"]

    def load(self) -> Config:
        """The run's configuration."""
        return load_config(self.variant.config, self.overrides)


def load_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        InputError: missing or malformed file, unknown or missing key, wrong type, nothing to try, or something twice.
    """
    content = read_over(Study, path)
    with reported(str(path)):
        study: Study = OmegaConf.to_object(content)
    study.output_dir = expanded(study.output_dir or f"runs/{path.stem}")
    study.report, study.configs = expanded(study.report), [expanded(config) for config in study.configs]
    for key in ("configs", "seeds"):
        values = getattr(study, key)
        if not values:
            raise InputError(f"{path}: {key} = []: at least one is needed")
        _refuse_twice(f"{path}: {key}", values)
    if len(study.ways) < 2:
        raise InputError(f"{path}: ways = {list(study.ways)}: at least two are needed, the baseline first")
    return study


def variants(study: Study, path: Path) -> list[Variant]:
    """Every way of every configuration, checked against the configuration's schema.

    Raises:
        InputError: a configuration is missing or refuses a seed or what a way overrides, or two ways are the same.
    """
    found = [
        Variant(
            path.parent / config, way, tuple(overrides), Path(study.output_dir, f"{Path(config).stem}_{_slug(way)}")
        )
        for config in study.configs
        for way, overrides in study.ways.items()
    ]
    _refuse_twice(f"{path}: folders of the runs", [variant.folder for variant in found])
    for config in study.configs:
        for seed in study.seeds:
            with errors_at(str(path)):
                load_config(path.parent / config, [f"seed={seed}"])
    contents: dict[Path, dict[str, str]] = {}
    for variant in found:
        with errors_at(f"{path}: ways: {variant.way}"):
            for override in variant.overrides:
                if override.partition("=")[0] in OWN_KEYS:
                    raise InputError(f"override {override!r}: {' and '.join(OWN_KEYS)} are the study's own")
            text = repr(load_config(variant.config, variant.overrides))
            other = contents.setdefault(variant.config, {}).setdefault(text, variant.way)
            if other != variant.way:
                raise InputError(f"is the same configuration as {other}")
    return found


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Say in an InputError which part of a study it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def planned_runs(study: Study, variants: Sequence[Variant]) -> list[PlannedRun]:
    """All runs; every variant's first seed comes before anything's second."""
    return [PlannedRun(variant, seed) for seed in study.seeds for variant in variants]


def _slug(way: str) -> str:
    return re.sub(r"[^\w.]+", "_", way).strip("_").lower()


def _refuse_twice(place: str, values: Sequence[object]) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise InputError(f"{place}: {value} comes {count} times")


def train_missing(runs: Sequence[PlannedRun], jobs: int) -> None:
    """Start or continue every run that is not finished, each in a process with one thread.

    Raises:
        InputError: a folder holds another run than the planned one, or somebody writes into it.
        RunError: a run failed; those beside it were trained to their ends.
        KeyboardInterrupt: those that were running have ended; their checkpoints are whole.
    """
    for run in runs:
        _refuse_another(run)
    missing = [run for run in runs if why_unfinished(RunFolder(run.folder)) is not None]
    processes: set[subprocess.Popen] = set()
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(_train, run, processes, pool): run for run in missing}
        with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", disable=None) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
                if bar.disable:
                    print(f"{futures[future].folder}: finished", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(processes):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _train(run: PlannedRun, processes: set[subprocess.Popen], pool: ThreadPoolExecutor) -> None:
    """Run tools/train_net.py to its end; it is among `processes` as long as it lasts. After a failure none starts."""
    command = [sys.executable, TRAIN_NET, "--resume", "--config", run.variant.config, *run.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which asks the runs to save and stop
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    ) as process:
        processes.add(process)
        _, said = process.communicate()
        processes.discard(process)
    if process.returncode:
        pool.shutdown(wait=False, cancel_futures=True)  # before this thread takes the next run
        last = said.strip().splitlines()[-1:] or [f"ended with exit code {process.returncode}"]
        raise RunError(f"{run.folder}: {last[0].removeprefix('error: ')}")


def _refuse_another(run: PlannedRun) -> None:
    folder = RunFolder(run.folder)
    refuse_if_written(folder)
    if not folder.config.exists():
        return
    study, run_as_trained = run.load(), load_config(folder.config)
    fill_in_from(study, run_as_trained)
    for key, (planned, trained) in differences(study, run_as_trained).items():
        if key != "output_dir" and planned != IF_AVAILABLE:  # which becomes false where it is not
            raise InputError(
                f"{run.folder}: was trained with {key} = {trained}, the study says {planned}: "
                "remove the folder to train it anew, or give the study another output_dir"
            )
