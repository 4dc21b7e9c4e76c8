"""SIGKILL anywhere: the resumed run ends as the one that was never killed, bit by bit."""

from __future__ import annotations

import random
import shutil
import signal
from itertools import cycle

import pytest

from tests.faults.conftest import assert_same_end

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


@pytest.mark.faults(
    fault="SIGKILL at a random point, of a single process or of one of two",
    promise="the resumed run ends bit-identical to one that was never killed: weights, averages, optimiser, metrics; "
    "the other process ends by itself",
)
@pytest.mark.parametrize(
    ("processes", "setting"),
    [(1, "data.workers=0"), (1, "data.workers=2"), (2, "distributed.strategy=ddp"), (2, "distributed.strategy=fsdp2")],
)
def test_a_killed_run(server, digits, finished, tmp_path, processes, setting):
    run, rng, killed = [*digits, setting], random.Random(setting), 0
    whole, name = finished(*run, processes=processes), f"output_dir={tmp_path}/killed"
    for _, place in zip(range(TRIES), cycle(PLACES), strict=False):
        entries, seconds = PLACES[place]
        kill = {"function": place, "entry": rng.randint(1, entries), "delay": rng.uniform(0, seconds)}
        victim = 0 if place in WRITING else killed % processes
        ended = server.run(*run, name, processes=processes, kill=kill, victim=victim)
        met = ended.pop(victim).code == -signal.SIGKILL
        for other in ended:
            if other.code:  # it may have had nothing more to do together
                assert met and other.code == 2 and "lost contact: another process has ended" in other.err, other.err
        server.succeed(*run, name, "--resume", "auto", processes=processes)
        assert_same_end(whole, tmp_path / "killed")
        killed += met
        shutil.rmtree(tmp_path / "killed")
        if killed == KILLS:
            return
    pytest.fail(f"only {killed} runs were killed")
