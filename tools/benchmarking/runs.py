"""Whole runs on JPEG files, from a file to an optimiser step: ours beside the loop of timm's train.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch

from engine.config import Config
from engine.trainer import Trainer
from tools.benchmarking.loading import recipe, timms_loader, write_images
from tools.benchmarking.steps import PLAIN, TIMM, Line, compared, in_turns, plain_steps, title, trainer_of

OURS, TIMMS = "our run", "timm's loop"


def measure_runs(
    configs: list[Config], images: int, workers: int, rounds: int, device: torch.device, photographs: Path | None
) -> Iterator[list[Line]]:
    """An epoch of training, from the start of the workers to the last step, with the same transforms and optimiser.

    Args:
        configs: models, sizes and batches.
        images: how many are made.
        photographs: a folder with train/<class> and val/<class> to read instead; None: pictures that are made.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if photographs is None else photographs
        if photographs is None:
            write_images(folder, images)
        for config in configs:
            batch, count = config.train.global_batch, len([*folder.glob("train/*/*")])
            usual = [f"data.root={folder}", "data.dataset=folder", f"data.workers={workers}", "train.epochs=1"]
            trainer = trainer_of(PLAIN, config, device, [*usual, "schedule.warmup_epochs=0", *recipe()])
            loader = timms_loader(folder, config.data.image_size, batch, workers, device)
            steps = plain_steps(TIMM, config, device, chain.from_iterable(repeat(loader)))

            epoch = {
                TIMMS: partial(next, islice(steps, len(loader) - 1, None, len(loader))),
                OURS: partial(_again, trainer),
            }
            seconds = in_turns(epoch, rounds)
            trained = batch * len(loader)
            speeds = {name: [trained / second for second in of_rounds] for name, of_rounds in seconds.items()}
            case = f"{title(config)}, {count} JPEGs, {workers} workers"
            yield list(compared("runs", case, "images/s", speeds).values())


def _again(trainer: Trainer) -> None:
    """Train from the first step to the last."""
    trainer.iteration = 0
    trainer.train()
