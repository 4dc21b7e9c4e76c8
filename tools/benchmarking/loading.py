"""Loading alone: our loader and timm's, with the same files, transforms, workers and batches."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from engine.config import TransformConfig
from engine.config_file import load_config
from engine.data.datasets import build_source
from engine.data.loaders import DataLoaders
from engine.distributed import Process
from tools.benchmarking.steps import CONFIG, OUR_LOADER, TIMMS_LOADER, Line, compared, in_turns

HEIGHT, WIDTH, IMAGE_SIZE = 375, 500, 224  # pixels, as most of ImageNet's, and of the model
RECIPE = {"auto_augment": "rand-m9-inc1", "color_jitter": 0.4}
ERASING = 0.25


def measure_loading(images: int, batch: int, workers: int, rounds: int, device: torch.device) -> list[Line]:
    """An epoch of training images on the device, from the start of the workers to the last batch."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images)
        timms = create_loader(
            create_dataset("", root=folder, split="train"),
            input_size=(3, IMAGE_SIZE, IMAGE_SIZE),
            batch_size=batch,
            is_training=True,
            re_prob=ERASING,
            re_mode="pixel",
            interpolation=TransformConfig.interpolation,  # timm's own choice is the cheaper bilinear
            num_workers=workers,
            device=device,
            pin_memory=device.type == "cuda",
            persistent_workers=False,
            **RECIPE,
        )
        overrides = [
            "data.dataset=folder",
            f"data.root={folder}",
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

        def our_epoch() -> None:
            with closing(loaders.train_from(0)) as batches:
                deque(batches, maxlen=0)

        seconds = in_turns({TIMMS_LOADER: lambda: deque(timms, maxlen=0), OUR_LOADER: our_epoch}, rounds)
    case = f"{images} JPEGs of {WIDTH} x {HEIGHT} to {IMAGE_SIZE} px, batch {batch}, {workers} workers"
    speeds = {name: [images / second for second in of_rounds] for name, of_rounds in seconds.items()}
    return list(compared("data", case, "images/s", speeds).values())


def write_images(root: Path, count: int) -> None:
    """Copies of one image of smooth noise, which compresses about as photographs do; two classes."""
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(root / "noise.jpg")
    for split, number in (("train", count), ("val", 2)):
        for index in range(number):
            folder = root / split / str(index % 2)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "noise.jpg", folder / f"{index}.jpg")
