"""SIGKILL in runs on shards: the resumed run ends as the one that was never killed, bit by bit."""

from __future__ import annotations

import random
import shutil
import signal
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.faults.conftest import assert_same_end
from tools import prepare_data

PLACES = {
    "Trainer.run_step": (34, 0.02),
    "Shards._open": (12, 0.02),
    "evaluate": (5, 0.05),
    "Checkpoint.save": (8, 0.02),
}
IN_WORKERS = ("Shards._open",)  # of the loader, where it has some: nothing to kill in the main process
KILLS, TRIES = 10, 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """1,000 digits to train on and 300 to evaluate, as PNG files in shards of 60: more shards than streams."""
    root, digits = tmp_path_factory.mktemp("shards"), load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:1300], digits.target, strict=False)):
        folder = root / "images" / ("train" if number < 1000 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * image).astype(np.uint8)).convert("RGB").save(folder / f"{number}.png")
    assert prepare_data.main([str(root / "images"), str(root / "tars"), "--samples-per-shard", "60"]) == 0
    return root / "tars"


@pytest.mark.faults(
    fault="SIGKILL at a random point of a run on shards, of a single process or one of two, with and without workers",
    promise="the resumed run ends bit-identical to one that was never killed",
)
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_killed_run_on_shards(server, digits, finished, shards, tmp_path, processes, workers):
    run = [*digits, "data.dataset=wds", f"data.root={shards}", "data.image_size=16", f"data.workers={workers}"]
    whole, name = finished(*run, processes=processes), f"output_dir={tmp_path}/killed"
    rng, killed = random.Random(10 * processes + workers), 0
    places = [place for place in PLACES if not (workers and place in IN_WORKERS)]
    for _, place in zip(range(TRIES), cycle(places), strict=False):
        entries, seconds = PLACES[place]
        kill = {"function": place, "entry": rng.randint(1, entries), "delay": rng.uniform(0, seconds)}
        victim = killed % processes
        ended = server.run(*run, name, processes=processes, kill=kill, victim=victim)
        killed += ended[victim].code == -signal.SIGKILL
        server.succeed(*run, name, "--resume", "auto", processes=processes)
        assert_same_end(whole, tmp_path / "killed")
        shutil.rmtree(tmp_path / "killed")
        if killed == KILLS:
            return
    pytest.fail(f"only {killed} runs were killed")
