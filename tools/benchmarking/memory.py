"""Peak memory of plain training and of MaskSub, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from engine.hooks.reporting import peak_resident
from models.build import build_on_meta
from tools.benchmarking.measurements import Measurement, Setting, compared
from tools.benchmarking.steps import MASKED, PLAIN, trainer_on_one_batch

STEPS = 3
# glibc gives freed blocks of that size back at once, so that resident memory follows the tensors
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(setting: Setting) -> list[Measurement]:
    """Weights, gradients, optimiser states and activations, at most, in a few steps.

    The limit: gradients of the main model are there while the sub-model computes, and not in plain training's forward.
    """
    gradients = 4 * sum(parameter.numel() for parameter in build_on_meta(setting.model, num_classes=10).parameters())
    peaks = {name: [_in_a_process(name, setting) / 1e6] for name in (PLAIN, MASKED)}
    limit = 1 + gradients / 1e6 / peaks[PLAIN][0]
    return compared("memory", str(setting), "MB", peaks, against={MASKED: PLAIN}, limits={MASKED: limit})


def _in_a_process(name: str, setting: Setting) -> int:
    os.environ.update(EXACT)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, name, setting).result()


def peak(name: str, setting: Setting) -> int:
    """Bytes that training needed at most, beyond what the process had before."""
    before = _resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_on_one_batch(name, setting, Path(folder))
        for _ in range(STEPS):
            trainer.run_iteration()
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident() - before


def _resident() -> int:
    """Bytes of this process in memory now; Linux tells, elsewhere the peak so far stands for it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_resident()
