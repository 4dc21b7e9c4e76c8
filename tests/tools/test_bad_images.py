"""Runs on folders with files that cannot be read, and runs that lose a loader worker."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

import tools.eval_net

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
FINETUNE = ROOT / "configs" / "finetune_folder.yaml"
BAD = ("train/cat/2.jpg", "train/fox/7.jpg", "val/dog/1.jpg")


@pytest.fixture
def spoiled(image_folder) -> Path:
    """The tiny folder, with two bad training images and a bad held-out one."""
    cut, empty, text = (image_folder / name for name in BAD)
    cut.write_bytes(cut.read_bytes()[:-500])
    empty.write_bytes(b"")
    text.write_text("404 not found")
    return image_folder


@pytest.fixture
def arguments(image_folder, tmp_path) -> list[str]:
    """A short run on the folder: three epochs of three steps."""
    return [
        "--config", str(FINETUNE), f"data.root={image_folder}", f"output_dir={tmp_path}/run", "model.name=test_vit",
        "model.pretrained=false", "data.image_size=32", "data.workers=0", "train.epochs=3", "train.global_batch=8",
    ]  # fmt: skip


def summary_and_log(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "run" / "summary.json").read_text()), (folder / "run" / "log.txt").read_text()


def assert_skipped(spoiled: Path, tmp_path: Path) -> None:
    """All three were, and each was named once."""
    summary, log = summary_and_log(tmp_path)
    assert summary["bad_files"] == 3 and summary["images"] == 8 and summary["iterations"] == 9
    for name in BAD:
        assert log.count(f"of 3 allowed (data.bad_files): {spoiled / name}: ") == 1
    assert re.search(r"bad files skipped +3 \(named in log.txt\)", log)


def test_what_is_left_out_is_said_of_every_run_and_evaluation(
    train_net, call, image_folder, arguments, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    (image_folder / "val" / "cat" / "notes.txt").touch()
    (image_folder / "val" / ".ipynb_checkpoints").mkdir()
    for tool, words in ((train_net, arguments), (partial(call, tools.eval_net), [tmp_path / "run", "data.workers=0"])):
        caplog.clear()
        code, _, error = tool(*words)
        assert code == 0, error
        (line,) = [message for message in caplog.messages if message.startswith("left out: ")]
        assert line.endswith(" (held-out)") and "1 .txt" in line and "1 hidden" in line


@pytest.mark.faults(
    fault="unreadable, truncated, zero-byte and mislabelled images, as many as data.bad_files allows",
    promise="others take their place, held-out ones are not counted; each is named in the log, all are in the summary",
)
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_named_once_and_counted(train_net, spoiled, arguments, tmp_path, caplog, workers):
    code, _, error = train_net(*arguments, "data.bad_files=3", f"data.workers={workers}")
    assert code == 0, error
    assert_skipped(spoiled, tmp_path)
    caplog.clear()
    code, output, error = train_net(*arguments, "--eval-only", "data.bad_files=1", f"data.workers={workers}")
    assert code == 0, error
    assert f"bad file 1 of 1 allowed (data.bad_files): {spoiled / BAD[2]}: not an image that" in caplog.text
    results, (summary, _) = json.loads(output[output.index("{") :]), summary_and_log(tmp_path)
    assert results["images"] == 8 and results["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)


@pytest.mark.faults(
    fault="more unreadable images than data.bad_files allows",
    promise="one line that names the file and the key, exit code 2",
)
@pytest.mark.parametrize(
    ("allowed", "options"), [(2, []), (0, ["data.workers=2"]), (0, ["--eval-only", "evaluation.checkpoint=WEIGHTS"])]
)
def test_one_more_than_allowed_stops_with_its_name(train_net, spoiled, arguments, tmp_path, allowed, options):
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), tmp_path / "weights.pt")
    options = [option.replace("WEIGHTS", f"{tmp_path}/weights.pt") for option in options]
    code, _, error = train_net(*arguments, f"data.bad_files={allowed}", *options)
    line = error.splitlines()[-1]  # here the log goes to the same place
    assert code == 2 and line.startswith(f"error: data.bad_files = {allowed}: "), error
    assert any(f"{spoiled / name} cannot be read: " in line for name in BAD)


def test_a_resumed_run_remembers_the_names(train_net, spoiled, arguments, tmp_path):
    whole = {name: (spoiled / name).with_name("0.jpg").read_bytes() for name in BAD}
    assert train_net(*arguments, "data.bad_files=3", "train.max_iters=6")[0] == 0
    for name, content in whole.items():
        (spoiled / name).write_bytes(content)  # repaired, so only the checkpoint knows of them
    code, _, error = train_net(*arguments, "data.bad_files=3", "--resume")
    assert code == 0, error
    summary, log = summary_and_log(tmp_path)
    assert summary["bad_files"] == 3 and summary["images"] == 9
    assert len(re.findall(r"bad files skipped +3 \(named in log.txt\)", log)) == 2
    assert all(log.count(str(spoiled / name)) == 1 for name in BAD)


@pytest.mark.faults(
    fault="unreadable images, each met by one of two processes",
    promise="they are counted together",
)
def test_processes_count_together(command, torchrun, spoiled, arguments, tmp_path):
    finished = command(*torchrun, TRAIN_NET, *arguments, "data.bad_files=3")
    assert finished.returncode == 0, finished.stderr
    assert_skipped(spoiled, tmp_path)


def loader_workers(process: subprocess.Popen) -> list[int]:
    """Children of a run that are copies of it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    own = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == own]


@pytest.mark.faults(
    fault="a data loading worker is killed",
    promise="the run ends within seconds with one line that says so, exit code 2",
)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN_NET, "--config", DIGITS, f"output_dir={tmp_path}/run", "data.workers=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "log.txt").exists() and process.poll() is None:
        time.sleep(0.1)
    while len(workers := loader_workers(process)) < 2 and process.poll() is None:
        time.sleep(0.1)
    victim = workers[-1]
    os.kill(victim, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    # torch finds the death by its signal or, on a busy machine, by a wait that is too long
    died = rf"DataLoader worker \((pid {victim}\) is killed by signal: Killed|pid\(s\) {victim}\) exited unexpectedly)"
    remedy = r"if memory ran out, lower data.workers \(now 2\) or train.micro_batch"
    assert re.fullmatch(rf"error: a data loading worker died: {died}; {remedy}\n", error), error
