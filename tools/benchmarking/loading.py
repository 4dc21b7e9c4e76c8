"""Loading alone: our loader and timm's, with the same files, transforms, workers and batches."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from engine.config_file import load_config
from engine.data.datasets import build_source
from engine.data.loaders import DataLoaders
from engine.distributed import Process
from tools.benchmarking.measurements import Measurement, compared, in_turns
from tools.benchmarking.steps import CONFIG

HEIGHT, WIDTH = 375, 500  # pixels, as most of ImageNet's
CLASSES = 4
TIMM, OURS = "timm's create_loader", "our loader"
IMAGE_SIZE = 224
RECIPE = {"auto_augment": "rand-m9-inc1", "color_jitter": 0.4}
ERASING = 0.25


def measure_loading(images: int, batch: int, workers: int, rounds: int, device: torch.device) -> list[Measurement]:
    """An epoch of training images on the device, from the start of the workers to the last batch."""
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder), images)
        steps = {TIMM: _timm_epoch(folder, batch, workers, device), OURS: _our_epoch(folder, batch, workers, device)}
        seconds = in_turns(steps, rounds, warm_up=1, device=device)
    case = f"{images} JPEGs of {WIDTH} x {HEIGHT} to {IMAGE_SIZE} px, batch {batch}, {workers} workers"
    speeds = {name: [images / second for second in of_rounds] for name, of_rounds in seconds.items()}
    return compared("data", case, "images/s", speeds, against={OURS: TIMM})


def _timm_epoch(root: str, batch: int, workers: int, device: torch.device) -> Callable[[], object]:
    loader = create_loader(
        create_dataset("", root=root, split="train"),
        input_size=(3, IMAGE_SIZE, IMAGE_SIZE),
        batch_size=batch,
        is_training=True,
        re_prob=ERASING,
        re_mode="pixel",
        num_workers=workers,
        device=device,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        **RECIPE,
    )
    return lambda: deque(loader, maxlen=0)


def _our_epoch(root: str, batch: int, workers: int, device: torch.device) -> Callable[[], object]:
    overrides = [
        "data.dataset=folder",
        f"data.root={root}",
        f"data.image_size={IMAGE_SIZE}",
        f"data.workers={workers}",
        f"train.global_batch={batch}",
        "train.epochs=1",
        "schedule.warmup_epochs=0",
        f"transform.random_erase={ERASING}",
        *(f"transform.{key}={value}" for key, value in RECIPE.items()),
    ]
    config = load_config(CONFIG, overrides)
    loaders = DataLoaders(config, build_source(config), Process(rank=0, world_size=1, device=device))

    def epoch() -> None:
        with closing(loaders.train_from(0)) as batches:
            deque(batches, maxlen=0)

    return epoch


def _write_images(root: Path, count: int) -> None:
    """Smooth noise, which compresses about as photographs do."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", CLASSES)):
        for index in range(number):
            folder = root / split / str(index % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")
