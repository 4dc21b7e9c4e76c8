"""SIGKILL anywhere: the resumed run ends as the one that was never killed, bit by bit."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from itertools import cycle, islice

import pytest

# Where the process is when it is killed, how often that place is surely entered, and for how long (seconds)
PLACES = {
    "Trainer.run_step": (34, 0.02),
    "evaluate": (5, 0.05),
    "Checkpoint.save": (8, 0.02),
    "CheckpointStore._write": (6, 0.01),
    "CheckpointStore._put": (3, 0.002),
    "train": (1, 3.0),
}
WRITING = ("CheckpointStore._write", "CheckpointStore._put")  # the main process alone
KILLS, TRIES = 20, 60
PROMISE = "the resumed run ends bit-identical to one that was never killed: weights, averages, optimiser, metrics"


def kills(seed: int) -> Iterator[dict]:
    """Random points, all places in turn."""
    rng = random.Random(seed)
    for place in islice(cycle(PLACES), TRIES):
        entries, seconds = PLACES[place]
        yield {"function": place, "entry": rng.randint(1, entries), "delay": rng.uniform(0, seconds)}


@pytest.mark.faults(fault="SIGKILL at a random point, one process", promise=PROMISE)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run(server, digits, tmp_path, assert_same_end, workers):
    run = [*digits, f"data.workers={workers}"]
    assert server.run(*run, f"output_dir={tmp_path}/whole").code == 0
    killed, points = 0, kills(seed=workers)
    while killed < KILLS:
        kill = next(points)
        name = f"output_dir={tmp_path}/killed"
        ended = server.run(*run, name, kill=kill)
        assert ended.code in (-signal.SIGKILL, 0), ended.err
        resumed = server.run(*run, name, "--resume", "auto")
        assert resumed.code == 0, (kill, resumed.err)
        assert_same_end(tmp_path / "whole", tmp_path / "killed")
        killed += ended.code != 0
        shutil.rmtree(tmp_path / "killed")


@pytest.mark.faults(fault="SIGKILL of one of two processes", promise=PROMISE + "; the other process ends by itself")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_of_two(server, digits, tmp_path, assert_same_end, strategy):
    run = [*digits, f"distributed.strategy={strategy}"]
    assert [end.code for end in server.run_processes(2, *run, f"output_dir={tmp_path}/whole")] == [0, 0]
    killed, points = 0, kills(seed=7)
    while killed < KILLS:
        kill = next(points)
        name = f"output_dir={tmp_path}/killed"
        victim = 0 if kill["function"] in WRITING else killed % 2
        ended = server.run_processes(2, *run, name, kill=kill, victim=victim)
        met, other = ended[victim].code == -signal.SIGKILL, ended[1 - victim]
        if other.code:  # it may have had nothing more to do together
            assert met and other.code == 2 and "lost contact: another process has ended" in other.err, other.err
        resumed = server.run_processes(2, *run, name, "--resume", "auto")
        assert [end.code for end in resumed] == [0, 0], (kill, [end.err for end in resumed])
        assert_same_end(tmp_path / "whole", tmp_path / "killed")
        killed += met
        shutil.rmtree(tmp_path / "killed")
