"""How fast a run will be where it is planned: a few steps on random images, and the reading of a few of its own."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import torch
from torch import Tensor

from engine.config import Config
from engine.data.images import UnreadableImage
from engine.data.source import DataSource
from engine.errors import is_out_of_memory
from engine.evaluation.speed import timed
from engine.text import readable_size, readable_time
from engine.trainer import Trainer

LONG = 1.0  # seconds for a number of images, after which no larger number is tried
LOOKED_AT = 32  # images whose reading is timed


def time_rows(config: Config, trainer: Trainer, has_data: bool) -> list[tuple[str, str]]:
    """How long the run takes, what limits it, and on a GPU the memory. All processes must call it together."""
    data, device = trainer.data, trainer.process.device
    images, seconds = micro_batch_time(config, trainer)
    if not images:
        return [("time", f"not known: {device.type} has too little memory for the fewest images at once")]
    update = timed(trainer.process, lambda: trainer.precision.step(trainer.optimizer))
    step = data.accumulation * seconds * data.micro_batch / images + update
    per_step = data.accumulation * data.micro_batch
    basis = f"{1000 * step:,.0f} ms per step, measured with {images} of {data.micro_batch} images at once"
    rows = [("  computing", f"{_rate(per_step / step)} on {device.type}, {basis}")]
    if has_data:
        rate, workers = reading_rate(data.source), min(config.data.workers, os.cpu_count() or 1)
        reading = per_step / (rate * max(1, workers))
        is_limit = ", the limit: data.workers, data.draft_decoding" if reading > step else ""
        feeding = f"{workers} workers of {_rate(rate)} each" if workers else "the training process itself"
        rows.append(("  loading", f"{_rate(per_step / reading)} by {feeding}{is_limit}"))
        step = max(step, reading) if workers else step + reading
    if device.type == "cuda":
        most = readable_size(torch.cuda.max_memory_allocated(device))
        rows.append(("  memory, measured", f"{most} with {images} images at once"))
    total = readable_time(trainer.max_iterations * step)
    each = ", of each process" if trainer.process.world_size > 1 else ""
    return [("time", f"about {total}, without evaluations and checkpoints{each}"), *rows]


def micro_batch_time(config: Config, trainer: Trainer) -> tuple[int, float]:
    """How many random images were computed at once, and the seconds of all branches, forward and backward.

    A micro-batch, or what of it takes about a second, or what memory has room for: 0 where that is nothing.
    """
    images, seconds = 0, 0.0
    trainer.model.train()
    for count in _counts(trainer):
        batch, targets = _random_images(config, trainer, count)

        def branches(batch: Tensor = batch, targets: Tensor = targets) -> None:
            with trainer.precision.autocast():
                trainer.objective.backward(trainer.model, batch, targets, trainer.precision.backward)

        try:
            timed(trainer.process, branches)  # the first time is slower
            images, seconds = count, timed(trainer.process, branches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if seconds > LONG:
            break
    return images, seconds


def reading_rate(source: DataSource) -> float:
    """Training images that one process reads and transforms in a second."""
    count, start = min(LOOKED_AT, len(source.train)), time.perf_counter()
    for number in range(count):
        with suppress(UnreadableImage):
            source.train[number]
    return count / (time.perf_counter() - start)


def _rate(value: float) -> str:
    return f"{value:,.0f} images/s" if value >= 100 else f"{value:.3g} images/s"


def _counts(trainer: Trainer) -> list[int]:
    """A micro-batch and its halves, the smallest first, as far as they can be mixed and shared by sub-models."""
    counts = [trainer.data.micro_batch]
    least = max([2, *(2 / sub_model.share for sub_model in trainer.objective.sub_models)])
    while counts[0] % 4 == 0 and counts[0] / 2 >= least:
        counts.insert(0, counts[0] // 2)
    return counts


def _random_images(config: Config, trainer: Trainer, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W) and targets, mixed as in a step."""
    source, device = trainer.data.source, trainer.process.device
    images = torch.randn(count, *source.image_shape(config.data.image_size), device=device)
    if source.has_several_labels:
        return images, torch.zeros(count, source.num_classes, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    return (images, labels) if trainer.mix is None else trainer.mix(images, labels)
