"""Image files: which files are images, how they and their classes are numbered, and what cannot be read of them."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from engine.errors import InputError, first_line

NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, and decodes none by itself
LABELS = ("targets", "labels", "_labels")  # where torchvision's sets have them


class UnreadableImage(Exception):
    """A data set cannot give an image; raised with its name and the reason."""


def decode(source: BinaryIO | Image.Image) -> Image.Image:
    """An image, or the first one in an open file, as eight bits of red, green and blue.

    Pixels are as they are stored: an EXIF orientation is not applied and transparency is dropped, as timm and
    torchvision do. Weights are pretrained and published numbers measured so, and whoever predicts with timm later sees
    the same. Sixteen bits become the nearest eight: Pillow's own conversion would clip them at 255.
    """
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if image.mode.startswith("I"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    image.load()
    image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn that it is lost
    return image.convert("RGB")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of all files that Pillow decodes here, in lower case, with their dot."""
    Image.init()
    decoded = (Image.OPEN.keys() | {"MPO"}) - NOT_DECODED  # MPO: two photographs, which the JPEG reader opens
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in decoded)


def is_image(name: str) -> bool:
    """Whether a file of that name holds an image, by its suffix in any case; hidden ones do not count."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sorting key: numbers by their value, letters whatever their case, and where that ties character by character.

    timm's key, of which this is a refinement, leaves `A` and `a`, or `1` and `01`, in the order of a set, which differs
    between processes, and takes characters like `²` for numbers.
    """
    pieces = re.split(r"(\d+)", name.lower())
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], name


def images_below(folder: Path, left_out: Counter[str]) -> Iterator[str]:
    """Paths of the images at any depth; `left_out` counts other files by suffix, and what is hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        left_out.update("hidden" for name in folders + names if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if is_image(name):
                yield os.path.join(place, name)
            elif not name.startswith("."):
                left_out[os.path.splitext(name)[1].lower() or "without suffix"] += 1


@dataclass
class ImageFiles:
    """Image files with labels: pairs (open file, label) by number.

    Attributes:
        root: where they lie.
        samples: pairs (path, label).
        class_to_idx: labels by name of their class.
        left_out: how many files and hidden folders beside the images were left out, by suffix.
    """

    root: str
    samples: list[tuple[str, int]]
    class_to_idx: Mapping[str, int]
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in their order.

    Raises:
        InputError: there is none.
    """
    classes = [path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")]
    if not classes:
        raise InputError(f"{folder}: has no class folders")
    return sorted(classes, key=natural_order)


def image_folder(root: Path, class_to_idx: Mapping[str, int] | None = None) -> ImageFiles:
    """The images directly in class folders.

    Images are numbered in the natural order of their paths, classes in that of their names, which is timm's order where
    timm has one.

    Args:
        root: folder of the class folders.
        class_to_idx: labels by class folder; None numbers the folders.

    Raises:
        InputError: no class folders, one without an image, or an image that does not lie directly in a class folder.
    """
    classes = class_to_idx or {name: label for label, name in enumerate(class_folders(root))}
    labels = {os.path.join(root, name): label for name, label in classes.items()}
    files = ImageFiles(str(root), [], classes)
    for path in images_below(root, files.left_out):
        folder = os.path.dirname(path)
        if folder not in labels:
            raise InputError(f"{path}: an image must lie directly in a class folder of {root}")
        files.samples.append((path, labels[folder]))
    filled = {label for _, label in files.samples}
    for folder, label in labels.items():
        if label not in filled:
            raise InputError(f"{folder}: the class folder holds no image")
    files.samples.sort(key=lambda sample: natural_order(sample[0]))
    return files


class Images(Dataset):
    """Pairs (transformed image, label), of which one that cannot be read is an UnreadableImage.

    Args:
        items: pairs (open file or image, label) by number: ImageFiles, a reader of timm's, a data set of torchvision.
        transform: of an RGB image.
        split: what images of a data set that is no folder are called by, beside their number.
    """

    def __init__(self, items: Any, transform: Callable[[Image.Image], Any], split: str) -> None:
        self._items, self._transform, self._split = items, transform, split
        self.left_out: Counter[str] = getattr(items, "left_out", Counter())

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            source, label = self._items[index]
            with source:
                image = decode(source)
        except MemoryError:
            raise  # says nothing about the file
        except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
            is_file = isinstance(self._items, ImageFiles)
            name = self._items.samples[index][0] if is_file else f"{self._split} image {index}"
            is_other = isinstance(error, UnidentifiedImageError)  # which tells of a Python object
            raise UnreadableImage(name, "not an image that Pillow knows" if is_other else first_line(error)) from error
        return self._transform(image), label

    def listing(self) -> Iterator[str]:
        """A line for each image: of files path and label, else the label; nothing if the data set lists none."""
        if isinstance(self._items, ImageFiles):
            return (f"{path.removeprefix(self._items.root)}\0{label}" for path, label in self._items.samples)
        if hasattr(self._items, "label_key"):  # timm's reader of Hugging Face's data sets
            return map(str, self._items.dataset[self._items.label_key])
        labels = next((getattr(self._items, name) for name in LABELS if hasattr(self._items, name)), ())
        return map(str, np.asarray(labels).tolist())
