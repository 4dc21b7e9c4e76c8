"""Peak memory of plain training and of MaskSub, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat

import torch

from engine.config import Config
from engine.hooks.reporting import peak_resident
from models.build import build_on_meta
from tools.benchmarking.steps import MASKED, PLAIN, Line, compared, step_of, title, training_costs

STEPS = 3
LEAST_IMAGES = 16  # so that activations outweigh gradients, as on GPUs
# glibc gives freed blocks of that size back at once, so that resident memory follows the tensors
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(config: Config, device: torch.device, only: Sequence[str] | None) -> list[Line]:
    """Weights, gradients, optimiser states and activations, at most, in a few steps.

    The limit of masking: gradients of the main model are there while the sub-model computes, and not in plain
    training's forward.
    """
    batch = max(config.train.global_batch, LEAST_IMAGES)
    config = replace(config, train=replace(config.train, global_batch=batch))
    parameters = sum(weight.numel() for weight in build_on_meta(config.model.name, num_classes=10).parameters())
    os.environ.update(EXACT)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        names = [name for name in only or (PLAIN, MASKED) if name in training_costs(config)]
        peaks = dict(zip(names, pool.map(peak, names, repeat(config), repeat(device)), strict=True))
    lines = compared("memory", title(config), "MB", {name: [nbytes / 1e6] for name, nbytes in peaks.items()})
    if {PLAIN, MASKED} <= peaks.keys():
        lines[MASKED]["limit"] = 1 + 4 * parameters / peaks[PLAIN]
    return list(lines.values())


def peak(name: str, config: Config, device: torch.device) -> int:
    """Bytes that training needed at most, beyond what the process had before."""
    before = peak_resident()
    step = step_of(name, config, device)
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident() - before
