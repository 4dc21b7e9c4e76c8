"""A study: ways of training, each tried with several seeds. Its file, the runs that follow from it, their training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Dict, List, Optional  # noqa: UP035  (OmegaConf reads these at run time)

from omegaconf import MISSING, OmegaConf
from tqdm import tqdm

from engine.config import Config
from engine.config_file import differences, fill_in_from, load_config, read_over, reported
from engine.errors import InputError, RunError
from engine.run_folder import RunFolder
from engine.text import expanded
from tools.comparison.runs import OWN_KEYS, recipe, refuse_if_written, why_unfinished

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
class PlannedRun:
    """One way of training of one configuration, with one seed.

    Attributes:
        base: the configuration's file.
        overrides: all that the run changes in it.
        config: what the two make.
        flops: multiply-adds of all forwards of a step, per image.
    """

    base: Path
    way: str
    overrides: list[str]
    config: Config
    flops: int

    @property
    def folder(self) -> RunFolder:
        """Where it is trained."""
        return RunFolder(self.config.output_dir)


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
    for key in ("configs", "seeds"):
        if not getattr(study, key):
            raise InputError(f"{path}: {key} = []: at least one is needed")
    if len(study.ways) < 2:
        raise InputError(f"{path}: ways = {list(study.ways)}: at least two are needed, the baseline first")
    return study


def plan(study: Study, path: Path) -> list[PlannedRun]:
    """All runs of the study in a file, the first seed of everything before the second one of anything.

    Raises:
        InputError: a configuration is missing, it or its model refuses a seed or what a way overrides, or two ways
            are the same.
    """
    from tools.analysis import analyze_configured  # here: who only compares does not wait for torch

    runs: list[PlannedRun] = []
    known: dict[tuple[Path, str], str] = {}
    for base, way in product([path.parent / config for config in study.configs], study.ways):
        name = re.sub(r"[^\w.]+", "_", way).strip("_").lower()
        try:
            for override in study.ways[way]:
                if override.partition("=")[0] in OWN_KEYS:
                    raise InputError(f"override {override!r}: {' and '.join(OWN_KEYS)} are the study's own")
            config = load_config(base, study.ways[way])
            other = known.setdefault((base, recipe(config)), way)
            if other != way:
                raise InputError(f"is the same configuration as {other}")
            cost = analyze_configured(config)
            for seed in study.seeds:
                folder = Path(study.output_dir, f"{base.stem}_{name}_seed{seed}")
                overrides = [*study.ways[way], f"seed={seed}", f"output_dir={folder}"]
                config = load_config(base, overrides)
                runs.append(PlannedRun(base, way, overrides, config, cost.main.flops + cost.sub_flops))
        except InputError as error:
            raise InputError(f"{path}: ways: {way}: {error}") from error
    folder, count = Counter(run.config.output_dir for run in runs).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: configs, seeds, ways: {folder} would be the folder of {count} runs")
    return sorted(runs, key=lambda run: study.seeds.index(run.config.seed))


def train_missing(runs: Sequence[PlannedRun], jobs: int) -> None:
    """Start or continue every run that is not finished, each in a process with one thread.

    Raises:
        InputError: a folder holds another run than the planned one, or somebody writes into it.
        RunError: a run failed; those beside it were trained to their ends.
        KeyboardInterrupt: those that were running have ended; their checkpoints are whole.
    """
    for run in runs:
        _refuse_another(run)
    missing = [run for run in runs if why_unfinished(run.folder) is not None]
    processes: set[subprocess.Popen] = set()
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(_train, run, processes, pool): run for run in missing}
        with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", disable=None) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
                if bar.disable:
                    print(f"{futures[future].folder.path}: finished", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(processes):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _train(run: PlannedRun, processes: set[subprocess.Popen], pool: ThreadPoolExecutor) -> None:
    """Run tools/train_net.py to its end; it is among `processes` as long as it lasts. After a failure none starts."""
    command = [sys.executable, TRAIN_NET, "--resume", "--config", run.base, *run.overrides]
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
        raise RunError(f"{run.folder.path}: {last[0].removeprefix('error: ')}")


def _refuse_another(run: PlannedRun) -> None:
    from engine.defaults import IF_AVAILABLE  # here: who only compares does not wait for torch

    refuse_if_written(run.folder)
    if not run.folder.config.exists():
        return
    study, run_as_trained = load_config(run.base, run.overrides), load_config(run.folder.config)
    fill_in_from(study, run_as_trained)
    for key, (planned, trained) in differences(study, run_as_trained).items():
        if key != "output_dir" and planned != IF_AVAILABLE:  # which becomes false where it is not
            raise InputError(
                f"{run.folder.path}: was trained with {key} = {trained}, the study says {planned}: "
                "remove the folder to train it anew, or give the study another output_dir"
            )
