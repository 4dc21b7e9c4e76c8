"""How fast a model predicts, and what it computes and needs for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import augsub
from engine.distributed import Process
from engine.precision import Precision
from models.complexity import GIGA, MANY, MEGA, count_forward

ON_CPU = 32  # images at once at most: more are no faster there
REPEATS, ENOUGH = 30, 3.0  # forwards at most, and seconds after which there are no more of them


def timed(process: Process, compute: Callable[[], object]) -> float:
    """Seconds until the device is done, of the slowest process. All processes must call it together."""
    start = time.perf_counter()
    compute()
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return max(process.gather(time.perf_counter() - start))


@torch.inference_mode()
def measure_speed(
    model: nn.Module,
    image_shape: Sequence[int],
    batch: int,
    precision: Precision,
    process: Process,
    augmentation: augsub.SubModelAugmentation | None = None,
) -> dict[str, float]:
    """Forwards of random images, by the names that timm's benchmark has. All processes must call it together.

    Args:
        model: in evaluation mode, patched.
        image_shape: (C, H, W).
        batch: images at once, on a GPU.
        augmentation: of a sub-model; None: the main model.

    Returns:
        `infer_samples_per_sec` and `infer_step_time` (ms) of a batch of `infer_batch_size`, `infer_latency` (ms) of a
        single image, in one process, the fastest of some: what else the machine does makes others slower;
        `infer_gmacs` and `infer_macts` of an image, 10^9 multiply-adds and 10^6 activations; on a GPU `infer_memory`,
        bytes at most in a batch, weights included.
    """
    batch = batch if process.device.type == "cuda" else min(batch, ON_CPU)
    arguments = {} if augmentation is None else {"augsub": augmentation}
    milliseconds = {}
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    for images in (1, batch):
        inputs = torch.randn(images, *image_shape, device=process.device)

        def forward(inputs: torch.Tensor = inputs) -> None:
            with precision.autocast():
                model(inputs, **arguments)

        seconds = [timed(process, forward) for _ in range(2)][1:]  # the first time is slower
        while len(seconds) < REPEATS and sum(seconds) < ENOUGH:
            seconds.append(timed(process, forward))
        milliseconds[images] = 1e3 * min(seconds)
    of_many = count_forward(model, (MANY, *image_shape), augmentation)
    found = {
        "infer_samples_per_sec": 1e3 * batch / milliseconds[batch],
        "infer_step_time": milliseconds[batch],
        "infer_batch_size": batch,
        "infer_latency": milliseconds[1],
        "infer_gmacs": of_many.flops / MANY / GIGA,
        "infer_macts": of_many.activations / MANY / MEGA,
    }
    if process.device.type == "cuda":
        found["infer_memory"] = torch.cuda.max_memory_allocated(process.device)
    return found
