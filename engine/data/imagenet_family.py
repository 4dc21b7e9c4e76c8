"""The test sets around ImageNet-1k: the same classes, other images or other labels.

=========  =====================================================  ==============================================
variant    what it is                                             `data.root` holds
=========  =====================================================  ==============================================
real       ImageNet's validation images with all labels that are  ILSVRC2012_val_<number>.JPEG, at any depth
           right (Beyer et al., arXiv 2006.07159), from timm
v2         new images (Recht et al., arXiv 1902.10811)            folders named 0 to 999, the classes' numbers
a          images that fool a ResNet-50, 200 classes              folders named by synset
           (Hendrycks et al., arXiv 1907.07174)
r          renditions, 200 classes (arXiv 2006.16241)             folders named by synset
sketch     sketches, all classes (Wang et al., arXiv 1905.13549)  folders named by synset
objectnet  objects from unusual sides, in unusual places, the     images/ and mappings/, as it is unpacked
           113 classes that ImageNet has too (Barbu et al.,
           NeurIPS 2019); their red border of 2 pixels is cut
c          corrupted validation images, cropped to 224 pixels     <corruption>/<severity>/<synset>
           already (Hendrycks and Dietterich, arXiv 1903.12261)
=========  =====================================================  ==============================================

Of a, r and objectnet the model chooses among ImageNet's classes that can be right there (of objectnet as Taori et al.,
arXiv 2007.00644, have it). Clean images, for comparison, are those of ImageNet's validation of the same classes.

Class folders lie in `data.root` itself or in its folder of `data.eval_split`.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
from PIL import ImageOps
from timm.data import ImageNetInfo

from engine.config import Config, image_channels
from engine.data.files import ImageFiles, image_folder, images_below, split_folder
from engine.data.images import IGNORED, Images
from engine.data.source import DataSource, root_of
from engine.data.transforms import build_transform
from engine.errors import InputError, input_errors

LOGGER = logging.getLogger("engine")
CORRUPTED = "corrupted"  # of any images, engine/data/corruptions.py
VARIANTS = ("real", "v2", "a", "r", "sketch", "objectnet", "c")
COMPARED = ("v2", "a", "r", "sketch", "objectnet")  # with clean images of the same classes
# What a variant sets unless the user does: the images of c are cropped, its authors (robustness/ImageNet-C/test.py) use
# all of them
VARIANT_SETTINGS = {"c": ("transform.eval_crop=1.0",)}
NUM_CLASSES = 1000
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
# ImageNet-C's, with AlexNet's top-1 error in percent, mean over severities, to which an mCE relates those of a model
# (Hendrycks and Dietterich's code, robustness/ImageNet-C/test.py)
CORRUPTIONS = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip


def open_variant(variant: str, config: Config) -> dict[str, DataSource]:
    """A member of the ImageNet family in `data.root`: sets of held-out images by name, "" if it is the only one.

    Raises:
        InputError: unknown variant, missing folders, or others than the variant has.
    """
    if variant not in VARIANTS:
        raise InputError(f"--variant {variant}: allowed is {', '.join(VARIANTS)}, {CORRUPTED}")
    if config.data.dataset != "folder":
        raise InputError(f"--variant {variant}: is read from folders, not from data.dataset = {config.data.dataset}")
    root = root_of(config.data)
    if variant == "real":
        return _open_real(root, config)
    if variant == "c":
        return _open_corruptions(root, config)
    if variant == "objectnet":
        return _open_objectnet(root, config)
    candidates = list(map(int, _text(f"imagenet_{variant}_indices.txt").split())) if variant in ("a", "r") else None
    numbers = candidates or range(NUM_CLASSES)
    names = [str(number) if variant == "v2" else _info().index_to_label_name(number) for number in numbers]
    folder = split_folder(root, config.data.eval_split) or root
    return {"": replace(_source(image_folder(folder, names), config, numbers), candidates=candidates)}


def _open_real(root: Path, config: Config) -> dict[str, DataSource]:
    """Labels are the images' numbers, counted from 0; images without any right label are not counted."""
    right = json.loads(_text("imagenet_real_labels.json"))
    samples: list[tuple[str, int]] = []
    left_out: Counter[str] = Counter()
    for path in sorted(images_below(root, left_out)):
        match = VALIDATION_NAME.fullmatch(Path(path).name)
        number = int(match[1]) - 1 if match else -1
        if not 0 <= number < len(right):
            known = f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(right):08d}.JPEG"
            raise InputError(f"{path}: --variant real knows the images {known}")
        samples.append((path, number if right[number] else IGNORED))
    if len(samples) < len(right):
        LOGGER.warning("%s: only %d of the %d images of --variant real", root, len(samples), len(right))
    widest = max(map(len, right))
    accepted = torch.tensor([labels + [IGNORED] * (widest - len(labels)) for labels in right])
    source = _source(ImageFiles(str(root), samples, {}, left_out), config, range(NUM_CLASSES))
    return {"": replace(source, accepted=accepted)}


def _open_objectnet(root: Path, config: Config) -> dict[str, DataSource]:
    """Labels are the numbers of ObjectNet's classes, of which several of ImageNet's may be right."""
    known = {_info().index_to_description(number): number for number in range(NUM_CLASSES)}
    mappings = root / "mappings"
    texts = [mappings / name for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")]
    if missing := [str(file) for file in texts if not file.exists()]:
        raise InputError(f"--variant objectnet: {missing[0]} is missing: data.root holds images/ and mappings/")
    with input_errors(f"--variant objectnet: {mappings}"):
        folders, right = (json.loads(file.read_text()) for file in texts)
        named = {folder: right[label].split("; ") for folder, label in folders.items() if label in right}
    if unknown := {name for names in named.values() for name in names} - known.keys():
        raise InputError(f"--variant objectnet: {mappings}: no class of ImageNet: {', '.join(sorted(unknown))}")
    candidates = sorted({known[name] for names in named.values() for name in names})
    places = [[candidates.index(known[name]) for name in names] for names in named.values()]
    widest = max(map(len, places))
    accepted = torch.tensor([own + [IGNORED] * (widest - len(own)) for own in places])
    source = _source(image_folder(root / "images", [*named], leaves_out_others=True), config, candidates, border=2)
    return {"": replace(source, candidates=candidates, accepted=accepted)}


def clean_images(variant: str | None, source: DataSource, folder: str, config: Config) -> DataSource:
    """ImageNet's validation images of a variant's classes, among which the model chooses.

    Args:
        source: of the variant.
        folder: class folders named by synset, or the folder of a split that holds them.

    Raises:
        InputError: a variant that has none to compare, or folders that are missing.
    """
    if variant not in COMPARED:
        raise InputError(
            f"--clean: goes with --variant {', '.join(COMPARED)}, not with {variant or 'plain evaluation'}"
        )
    root, numbers = Path(folder), source.candidates or range(NUM_CLASSES)
    if not root.is_dir():
        raise InputError(f"--clean {folder}: no such folder")
    names = [_info().index_to_label_name(number) for number in numbers]
    images = image_folder(split_folder(root, config.data.eval_split) or root, names, leaves_out_others=True)
    return replace(_source(images, config, numbers), candidates=source.candidates)


def _open_corruptions(root: Path, config: Config) -> dict[str, DataSource]:
    """One source for each corruption and severity, named "fog/3"."""
    present = [name for name in CORRUPTIONS if (root / name).is_dir()]
    if not present:
        raise InputError(f"data.root = {root}: --variant c needs the folders of corruptions: {', '.join(CORRUPTIONS)}")
    if missing := [name for name in CORRUPTIONS if name not in present]:
        LOGGER.warning("%s: means are over %d of 15 corruptions, without %s", root, len(present), ", ".join(missing))
    places = [f"{corruption}/{severity}" for corruption in present for severity in range(1, 6)]
    numbers = range(NUM_CLASSES)
    return {place: _source(image_folder(root / place, synsets()), config, numbers) for place in places}


def _source(items: ImageFiles, config: Config, numbers: Sequence[int], border: int = 0) -> DataSource:
    """Held-out images whose labels are places in `numbers`; a class is called n01498041 stingray.

    Args:
        border: pixels that are cut off at each side before anything else.
    """
    transform, info = build_transform(config, is_training=False), _info()
    names = [
        f"{info.index_to_label_name(number)} {info.index_to_description(number).partition(',')[0]}"
        for number in numbers
    ]
    if border:
        transform.transforms.insert(0, partial(ImageOps.crop, border=border))
    images = Images(items, transform, "held-out", data=config.data)
    return DataSource(None, images, NUM_CLASSES, image_channels(config.data), names)


_info = cache(ImageNetInfo)


def synsets() -> list[str]:
    """Names of ImageNet's classes, by number."""
    return _info().label_names()


def _text(name: str) -> str:
    """A file of timm's class maps."""
    return (files("timm.data") / "_info" / name).read_text()
