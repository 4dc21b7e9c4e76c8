"""Whole runs on a GPU, as a user starts them: torchrun, resuming to the bit, signals, kills, what is exported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from engine.checkpoint import load
from engine.checkpoint_file import split_tensors

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
SHORT = ("--config", "digits_vit", "model.kwargs.depth=2", "data.workers=2", "checkpoint.period=4", "ema.enabled=true",
         "ema.decay=0.9", "mixup.mixup_alpha=0.8", "train.clip_norm=1.0", "train.global_batch=64")  # fmt: skip
DETERMINISTIC = "import torch\ntorch.use_deterministic_algorithms(True)\n"


@pytest.fixture
def environment(device, tmp_path) -> dict[str, str]:
    """Of the runs: this repository, a plugin of deterministic kernels, the device."""
    (tmp_path / "deterministic.py").write_text(DETERMINISTIC)
    path = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    return {**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **hidden}


@pytest.fixture
def start(environment):
    """Start a run in a process of its own."""

    def popen(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, *launcher, str(TRAIN_NET), *SHORT, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return popen


@pytest.fixture
def finish(start):
    """A run to its end; what it printed."""

    def run(*arguments: str, **settings) -> str:
        process = start(*arguments, **settings)
        output, error = process.communicate(timeout=180)
        assert process.returncode == 0, error
        return output

    return run


def weights(folder: Path) -> dict:
    """Every tensor that a run ends with."""
    return split_tensors(load(folder / "checkpoints" / "last.pt"))[0]


def largest_difference(one: dict, other: dict) -> float:
    """Of any value of two states."""
    assert one.keys() == other.keys()
    return max(float((one[path].double() - other[path].double()).abs().max()) for path in one if one[path].numel())


@pytest.mark.parametrize("kernels", ["deterministic", "default"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(finish, tmp_path, kernels, amp, report):
    run = (f"train.amp={amp}", *(["plugins=[deterministic]"] if kernels == "deterministic" else []))
    finish(*run, "train.max_iters=12", f"output_dir={tmp_path}/whole")
    for stop in (6, 12):
        finish(*run, "--resume", f"train.max_iters={stop}", f"output_dir={tmp_path}/parts")
    difference = largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    report(f"resumed with {kernels} kernels, {amp}: the largest difference of any value is {difference:.3g}")
    assert difference == 0 or kernels == "default"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_as_many_processes_as_there_are_devices(finish, device, tmp_path, strategy):
    processes = torch.cuda.device_count() if device.type == "cuda" else 2
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    output = finish(
        f"distributed.strategy={strategy}", "train.max_iters=8", f"output_dir={tmp_path}/run", launcher=launcher
    )
    assert f"{processes} x {device.type}" in output and "held-out top-1" in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_run_goes_on(start, finish, tmp_path, number, code):
    run = (f"output_dir={tmp_path}/run", "--resume")
    process, last = start(*run), tmp_path / "run" / "checkpoints" / "last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    done = load(last)["iteration"]
    assert f"after {done} of {done + 4}" in finish(*run, f"train.max_iters={done + 4}")


def test_an_exported_model_has_the_logits_of_the_run(finish, environment, device, tmp_path):
    finish("train.max_iters=8", f"output_dir={tmp_path}/run")
    command = [sys.executable, ROOT / "tools" / "export.py", tmp_path / "run" / "checkpoints" / "last.pt"]
    done = subprocess.run([*command, tmp_path / "x.safetensors"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = eval(done.stdout, {"timm": timm}).to(device).eval()
    model = eval(done.stdout, {"timm": timm})
    model.load_state_dict(load(tmp_path / "run" / "checkpoints" / "last.pt")["model"])
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(exported(images.to(device)).cpu(), model.eval()(images), rtol=1e-3, atol=1e-4)
