"""The test sets around ImageNet-1k: the same classes, other images or other labels.

=======  =======================================================  ==============================================
variant  what it is                                               `data.root` holds
=======  =======================================================  ==============================================
real     ImageNet's validation images with all labels that are    ILSVRC2012_val_<number>.JPEG, at any depth
         right (Beyer et al., arXiv 2006.07159), from timm
v2       new images (Recht et al., arXiv 1902.10811)              folders named 0 to 999, the classes' numbers
a        images that fool a ResNet-50, 200 classes                folders named by synset
         (Hendrycks et al., arXiv 1907.07174)
r        renditions, 200 classes (arXiv 2006.16241)               folders named by synset
sketch   sketches (Wang et al., arXiv 1905.13549)                 folders named by synset
c        corrupted validation images, cropped to 224 pixels       <corruption>/<severity>/<synset>
         already (Hendrycks and Dietterich, arXiv 1903.12261)
=======  =======================================================  ==============================================

Class folders lie in `data.root` itself or in its folder of `data.eval_split`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from timm.data import ImageDataset, ImageNetInfo
from torch import Tensor

from engine.config import Config
from engine.data.datasets import root_of, split_folder
from engine.data.files import ImageFolder, ImageList, class_folders, is_image, naming_bad_files
from engine.data.source import DataSource
from engine.data.stream import IGNORED
from engine.data.transforms import build_eval_transform
from engine.errors import InputError

LOGGER = logging.getLogger("engine")
VARIANTS = ("real", "v2", "a", "r", "sketch", "c")
# What a variant sets unless the user does: the images of c are cropped, its authors (robustness/ImageNet-C/test.py) use
# all of them
VARIANT_SETTINGS = {"c": ("transform.eval_crop=1.0",)}
NUM_CLASSES = 1000
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
SEVERITIES = ("1", "2", "3", "4", "5")
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
Classes = dict[str, int]  # labels by folder name


@dataclass(frozen=True)
class Benchmark:
    """What models are tested on.

    Attributes:
        sources: sets of held-out images with labels of the same classes, by name; "" if it is the only one.
        candidates: numbers of the model's classes among which it chooses, in the order of the labels; None: all.
        accepted: (N, M) all right classes of N images, filled up with IGNORED, of which labels are rows; None: labels
            are the classes.
    """

    sources: dict[str, DataSource]
    candidates: list[int] | None = None
    accepted: Tensor | None = None

    @property
    def source(self) -> DataSource:
        """The first one: all are of the same shape."""
        return next(iter(self.sources.values()))


def open_variant(variant: str, config: Config) -> Benchmark:
    """A member of the ImageNet family in `data.root`.

    Raises:
        InputError: unknown variant, missing folders, or others than the variant has.
    """
    if variant not in VARIANTS:
        raise InputError(f"--variant {variant}: allowed is {', '.join(VARIANTS)}")
    if config.data.dataset != "folder":
        raise InputError(f"--variant {variant}: is read from folders, not from data.dataset = {config.data.dataset}")
    root = root_of(config.data)
    if not root.is_dir():
        raise InputError(f"data.root = {root}: no such folder")
    if variant == "real":
        return _open_real(root, config)
    if variant == "c":
        return _open_corruptions(root, config)
    candidates = list(map(int, _lines(f"imagenet_{variant}_indices.txt"))) if variant in ("a", "r") else None
    numbers = candidates or range(NUM_CLASSES)
    names = [str(number) if variant == "v2" else synsets()[number] for number in numbers]
    classes = {name: label for label, name in enumerate(names)}
    folder = _folder_of_classes(root, classes, config.data.eval_split)
    _check_classes(folder, classes, variant)
    return Benchmark({"": _source(folder, classes, config, _descriptions(numbers))}, candidates)


def _open_real(root: Path, config: Config) -> Benchmark:
    """Labels are the images' numbers, counted from 0; images without any right label are not counted."""
    right = json.loads(_text("imagenet_real_labels.json"))
    paths = sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(root, followlinks=True)
        if not any(part.startswith(".") for part in Path(place).relative_to(root).parts)
        for name in filter(is_image, names)
    )
    numbers = [_validation_number(path, len(right)) for path in paths]
    if not paths:
        raise InputError(f"data.root = {root}: holds no image")
    if len(paths) < len(right):
        LOGGER.warning("%s: only %d of the %d images of --variant real", root, len(paths), len(right))
    labels = [number if right[number] else IGNORED for number in numbers]
    reader = ImageList(root, list(zip(paths, labels, strict=True)))
    widest = max(map(len, right))
    accepted = torch.tensor([labels + [IGNORED] * (widest - len(labels)) for labels in right])
    return Benchmark({"": _source_of(reader, config, _descriptions(range(NUM_CLASSES)))}, accepted=accepted)


def _validation_number(path: str, images: int) -> int:
    match = VALIDATION_NAME.fullmatch(Path(path).name)
    if match is None or not 1 <= int(match[1]) <= images:
        raise InputError(
            f"{path}: --variant real knows the images ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{images:08d}.JPEG"
        )
    return int(match[1]) - 1


def _open_corruptions(root: Path, config: Config) -> Benchmark:
    """One source for each corruption and severity, named "fog/3"."""
    found = _subfolders(root)
    if unknown := [name for name in found if name not in CORRUPTIONS]:
        raise InputError(
            f"data.root = {root}: --variant c has no corruption {unknown[0]}, only {', '.join(CORRUPTIONS)}"
        )
    present = [name for name in CORRUPTIONS if name in found]
    if not present:
        raise InputError(f"data.root = {root}: --variant c needs the folders of corruptions: {', '.join(CORRUPTIONS)}")
    if missing := [name for name in CORRUPTIONS if name not in found]:
        LOGGER.warning("%s: means are over %d of 15 corruptions, without %s", root, len(present), ", ".join(missing))
    classes = {name: label for label, name in enumerate(synsets())}
    names = _descriptions(range(NUM_CLASSES))
    sources = {}
    for corruption in present:
        if tuple(severities := _subfolders(root / corruption)) != SEVERITIES:
            raise InputError(
                f"{root / corruption}: --variant c needs the severities {', '.join(SEVERITIES)}, "
                f"here are {', '.join(severities) or 'none'}"
            )
        for severity in severities:
            _check_classes(root / corruption / severity, classes, "c")
            sources[f"{corruption}/{severity}"] = _source(root / corruption / severity, classes, config, names)
    return Benchmark(sources)


def _folder_of_classes(root: Path, classes: Classes, split: str) -> Path:
    """The root, or the folder of the split if only that may hold classes."""
    if not any((root / name).is_dir() for name in classes):
        with suppress(InputError):  # what the root lacks is said of the root
            return split_folder(root, split)
    return root


def _check_classes(folder: Path, classes: Classes, variant: str) -> None:
    found = class_folders(folder)
    missing, unknown = [name for name in classes if name not in found], [name for name in found if name not in classes]
    problems = [f"{len(missing)} are missing ({', '.join(missing[:3])} …)"] if missing else []
    problems += [f"{len(unknown)} are none of them ({', '.join(unknown[:3])} …)"] if unknown else []
    if problems:
        raise InputError(f"{folder}: --variant {variant} has {len(classes)} class folders: {' and '.join(problems)}")


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _source(folder: Path, classes: Classes, config: Config, names: Sequence[str]) -> DataSource:
    return _source_of(ImageFolder(folder, classes), config, names)


def _source_of(reader: ImageList, config: Config, names: Sequence[str]) -> DataSource:
    transform = build_eval_transform(config.transform, config.data.image_size)
    dataset = ImageDataset(reader.root, reader=reader, transform=transform)
    return DataSource(None, naming_bad_files(dataset, "held-out"), NUM_CLASSES, in_chans=3, class_names=names)


@cache
def synsets() -> list[str]:
    """Names of ImageNet's classes, by number."""
    return ImageNetInfo().label_names()


def _descriptions(numbers: Sequence[int]) -> list[str]:
    """Synset and the first of its words: n01498041 stingray."""
    info = ImageNetInfo()
    words = {number: info.index_to_description(number).partition(",")[0] for number in numbers}
    return [f"{synsets()[number]} {word}" for number, word in words.items()]


def _lines(name: str) -> list[str]:
    return _text(name).split()


def _text(name: str) -> str:
    """A file of timm's class maps."""
    return (files("timm.data") / "_info" / name).read_text()
