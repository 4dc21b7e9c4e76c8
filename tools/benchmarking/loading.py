"""Reading images: loading alone, our loader beside timm's, folders beside shards, huge photographs; and whole runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from engine.config import Config, DataConfig, TransformConfig
from engine.config_file import load_config
from engine.data.loaders import Batch, DataLoaders
from engine.data.source import build_source
from engine.distributed import Process
from engine.trainer import Trainer
from tools.benchmarking.steps import CONFIG, PLAIN, TIMM, Line, compared, in_turns, plain_steps, title, trainer_of
from tools.preparing import open_splits, write_shards

HEIGHT, WIDTH, IMAGE_SIZE = 375, 500, 224  # pixels, as most of ImageNet's, and of the model
HUGE = (4000, 3000)  # pixels, what a telephone's camera gives
SMALL, SAMPLES = 32, 500  # pixels of CIFAR-10, and images in a shard
RECIPE = {"auto_augment": "rand-m9-inc1", "color_jitter": 0.4}
ERASING = 0.25
OUR_LOADER, TIMMS_LOADER = "our loader", "timm's create_loader"
OURS, TIMMS = "our run", "timm's loop"
FOLDER, SHARDS, WHOLE, REDUCED = "class folders", "shards", "decoded whole", "data.draft_decoding"
Epoch = Callable[[], Any]


def measure_loading(
    images: int, batch: int, workers: int, rounds: int, device: torch.device, photographs: Path | None
) -> Iterator[list[Line]]:
    """An epoch of training images on the device, from the start of the workers to the last batch.

    Args:
        images, photographs: as `opened` takes them.
    """
    with tempfile.TemporaryDirectory() as made, opened(photographs, images) as folder:
        count, what = len([*folder.glob("train/*/*")]), f"to {IMAGE_SIZE} px, batch {batch}, {workers} workers"
        loader = timms_loader(folder, IMAGE_SIZE, batch, workers, device)
        epochs = {TIMMS_LOADER: lambda: deque(loader, maxlen=0)}
        epochs[OUR_LOADER] = our_epoch(folder, batch, workers, device, *recipe())
        size = f"{WIDTH} x {HEIGHT}" if photographs is None else photographs.name
        yield _lines("data", f"{count} JPEGs of {size} {what}", in_turns(epochs, rounds), count)

        count = images // 8
        write_images(Path(made, "huge"), count, *HUGE)
        epochs = {
            WHOLE: our_epoch(Path(made, "huge"), count, workers, device, "data.draft_decoding=false"),
            REDUCED: our_epoch(Path(made, "huge"), count, workers, device, "data.draft_decoding=true"),
        }
        yield _lines("data", f"{count} JPEGs of {HUGE[0]} x {HUGE[1]} {what}", in_turns(epochs, min(3, rounds)), count)

        count = 8 * images
        write_images(Path(made, "small"), count, SMALL, SMALL)
        for name, root, pixels in (("photographs", folder, IMAGE_SIZE), ("small", Path(made, "small"), SMALL)):
            yield _formats(root, Path(made, f"shards_{name}"), pixels, batch, workers, rounds, device)


def measure_runs(
    configs: list[Config], images: int, workers: int, rounds: int, device: torch.device, photographs: Path | None
) -> Iterator[list[Line]]:
    """An epoch of training, from the start of the workers to the last step, beside the loop of timm's train.py.

    With the same transforms and optimiser.

    Args:
        configs: models, sizes and batches.
        images, photographs: as `opened` takes them.
    """
    with opened(photographs, images) as folder:
        for config in configs:
            batch, count = config.train.global_batch, len([*folder.glob("train/*/*")])
            usual = [f"data.root={folder}", "data.dataset=folder", f"data.workers={workers}", "train.epochs=1"]
            trainer = trainer_of(PLAIN, config, device, [*usual, "schedule.warmup_epochs=0", *recipe()])
            loader = timms_loader(folder, config.data.image_size, batch, workers, device)
            steps = plain_steps(TIMM, config, device, chain.from_iterable(repeat(loader)))
            epochs = {
                TIMMS: partial(next, islice(steps, len(loader) - 1, None, len(loader))),
                OURS: partial(_again, trainer),
            }
            case = f"{title(config)}, {count} JPEGs, {workers} workers"
            yield _lines("runs", case, in_turns(epochs, rounds), batch * len(loader))


def _again(trainer: Trainer) -> None:
    """Train from the first step to the last."""
    trainer.iteration = 0
    trainer.train()


@contextmanager
def opened(photographs: Path | None, images: int) -> Iterator[Path]:
    """A folder with train/<class> and val/<class>: the user's photographs, or so many images that are made."""
    with nullcontext(photographs) if photographs else tempfile.TemporaryDirectory() as folder:
        if photographs is None:
            write_images(Path(folder), images)
        yield Path(folder)


def _formats(
    folder: Path, shards: Path, pixels: int, batch: int, workers: int, rounds: int, device: torch.device
) -> list[Line]:
    """Class folders and shards of the same images, which the system's cache does not hold."""
    classes, splits, _ = open_splits(folder, DataConfig())
    write_shards(splits, classes, shards, SAMPLES, None, workers or 1)
    size, count = f"data.image_size={pixels}", len(splits["train"])
    own = {
        FOLDER: our_epoch(folder, batch, workers, device, size),
        SHARDS: our_epoch(shards, batch, workers, device, size, "data.dataset=wds"),
    }
    forgetful = {name: _after_forgetting((folder, shards), epoch) for name, epoch in own.items()}
    case = f"{count} JPEGs to {pixels} px from the disk, not from its cache, batch {batch}, {workers} workers"
    return _lines("data", case, in_turns(forgetful, rounds), count)


def _after_forgetting(folders: tuple[Path, ...], epoch: Epoch) -> Epoch:
    """An epoch of which no file is in the system's cache; forgetting takes milliseconds, and counts for all alike."""
    files = [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]

    def forget_and_load() -> None:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        epoch()

    return forget_and_load


def _lines(part: str, case: str, seconds: dict[str, list[float]], images: int) -> list[Line]:
    speeds = {name: [images / second for second in of_rounds] for name, of_rounds in seconds.items()}
    return list(compared(part, case, "images/s", speeds).values())


def recipe() -> list[str]:
    """Overrides for the transforms that timm's loader has here."""
    return [f"transform.random_erase={ERASING}", *(f"transform.{key}={value}" for key, value in RECIPE.items())]


def our_epoch(root: Path, batch: int, workers: int, device: torch.device, *overrides: str) -> Epoch:
    """Loads every training image once, as `overrides` say."""
    usual = [
        "data.dataset=folder",
        f"data.root={root}",
        f"data.image_size={IMAGE_SIZE}",
        f"data.workers={workers}",
        f"train.global_batch={batch}",
        "train.epochs=1",
        "schedule.warmup_epochs=0",
    ]
    config = load_config(CONFIG, [*usual, *overrides])
    loaders = DataLoaders(config, build_source(config), Process(rank=0, world_size=1, device=device))

    def epoch() -> None:
        with closing(loaders.train_from(0)) as batches:
            deque(batches, maxlen=0)

    return epoch


def timms_loader(root: Path, image_size: int, batch: int, workers: int, device: torch.device) -> Iterable[Batch]:
    """Loads every training image once, as timm does."""
    return create_loader(
        create_dataset("", root=str(root), split="train"),
        input_size=(3, image_size, image_size),
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


def write_images(root: Path, count: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Copies of one image of smooth noise, which compresses about as photographs do; two classes."""
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(root / "noise.jpg", quality=90)
    for split, number in (("train", count), ("val", 2)):
        for index in range(number):
            folder = root / split / str(index % 2)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "noise.jpg", folder / f"{index}.jpg")
