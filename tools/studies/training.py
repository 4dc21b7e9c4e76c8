"""Training what a study still lacks, a few runs at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from engine.config_file import differences, fill_in_from, load_config
from engine.errors import InputError, RunError
from engine.run_folder import RunFolder
from engine.run_model import IF_AVAILABLE
from tools.comparison.finished_runs import refuse_if_written, why_unfinished
from tools.studies.study import PlannedRun

TRAIN_NET = Path(__file__).parents[1] / "train_net.py"


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
