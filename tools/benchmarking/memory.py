"""Peak memory of plain training and of MaskSub, each in a process of its own.

python -m tools.benchmarking.memory NAME SETTING DEVICE    # the setting as JSON; prints bytes
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from engine.errors import RunError
from engine.metrics import peak_resident
from engine.text import to_json
from models.build import create_model
from tools.benchmarking.measurements import Measurement, ratio_of
from tools.benchmarking.steps import PLAIN, Setting, trainer_on_one_batch

STEPS = 3
# glibc gives freed blocks of that size back at once, so that resident memory follows the tensors
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(setting: Setting, device: torch.device) -> list[Measurement]:
    """Weights, gradients, optimiser states and activations, at most, in a few steps.

    The limit: gradients of the main model are there while the sub-model computes, and not in plain training's forward.
    """
    gradients = 4 * sum(parameter.numel() for parameter in create_model(setting.model, num_classes=10).parameters())
    peaks = {name: _in_a_process(name, setting, device) for name in (PLAIN, "masking 0.5")}
    measurements = []
    for name, peak in peaks.items():
        compared = {} if name == PLAIN else {**ratio_of([peak], [peaks[PLAIN]]), "against": PLAIN}
        limit = None if name == PLAIN else 1 + gradients / peaks[PLAIN]
        measurements.append(Measurement("memory", str(setting), name, peak / 1e6, "MB", limit=limit, **compared))
    return measurements


def _in_a_process(name: str, setting: Setting, device: torch.device) -> int:
    command = [sys.executable, "-m", "tools.benchmarking.memory", name, to_json(asdict(setting)), str(device)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **EXACT}, cwd=root)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"{setting}, {name}: {reason}")
    return int(done.stdout.split()[-1])


def peak(name: str, setting: Setting, device: torch.device) -> int:
    """Bytes that training needed at most, beyond what the process had before."""
    before = _resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on_one_batch(name, setting, device, Path(folder))
        for _ in range(STEPS):
            trainer.run_iteration()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() - before


def _resident() -> int:
    """Bytes of this process in memory now; Linux tells, elsewhere the peak so far stands for it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_resident()
    return pages * resource.getpagesize()


if __name__ == "__main__":
    what, described, where = sys.argv[1:]
    print(peak(what, Setting(**json.loads(described)), torch.device(where)))
