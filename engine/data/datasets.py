"""The images of a configuration: a folder's files in their order, or any other data set that timm can open."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch.utils.data import Dataset

from engine.config import Config, DataConfig
from engine.data.source import DataSource, build_digits, build_synthetic
from engine.data.transforms import build_transform
from engine.errors import InputError, first_line
from engine.text import readable_name

# The names under which the folder of a split is looked for: timm's, and test
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))
KINDS = ("torch", "hfds")  # timm's others, hfids, tfds and wds, are streams, in which no image has a number
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, and decodes none by itself
LABELS = ("targets", "labels", "_labels")  # where torchvision's sets have them


def build_source(config: Config, with_training: bool = True) -> DataSource:
    """The data set that `data.dataset` names; without its training images, these need not be there."""
    data = config.data
    if data.dataset == "digits":
        return build_digits(data.image_size)
    if data.dataset == "synthetic":
        return build_synthetic(data.image_size, data.synthetic_samples)
    held_out, train = _open(data, data.eval_split), _open(data, data.train_split) if with_training else None
    classes = held_out.class_to_idx
    if train is not None and (differing := train.class_to_idx.items() ^ classes.items()):
        names = sorted({str(name) for name, _ in differing})
        raise InputError(f"data.root = {data.root}: the splits have different classes: {', '.join(names[:5])}")
    class_names = {number: readable_name(str(name)) for name, number in classes.items()}
    if len(class_names) < 2:
        raise InputError(
            f"data.root = {data.root}: the only class is {', '.join(class_names.values())}, at least two are needed"
        )
    num_classes = max(class_names) + 1
    transforms = [build_transform(config.transform, data.image_size, is_training) for is_training in (True, False)]
    return DataSource(
        train=None if train is None else Images(train, transforms[0], "training"),
        held_out=Images(held_out, transforms[1], "held-out"),
        num_classes=num_classes,
        in_chans=3,
        class_names=[class_names.get(number, str(number)) for number in range(num_classes)],
    )


def _open(data: DataConfig, split: str) -> Any:
    """Pairs (open file or image, label) by number, with their `class_to_idx`."""
    if data.dataset == "folder":
        root = root_of(data)
        folder = split_folder(root, split)
        if folder is None:
            raise InputError(f"data.root = {root}: no folder for the split {split} (any of {', '.join(_names(split))})")
        return image_folder(folder)
    place = f"data.dataset = {data.dataset}"
    if data.dataset.partition("/")[0].lower() not in KINDS:
        known = ", ".join(f"{kind}/NAME" for kind in KINDS)
        raise InputError(f"{place}: allowed is folder, digits, synthetic, or timm's {known}")
    try:
        dataset = create_dataset(data.dataset, root=data.root, split=split)
    except Exception as error:  # of other packages, or that they are not installed
        raise InputError(f"{place}, root = {data.root}, split {split}: {first_line(error)}") from error
    items = getattr(dataset, "reader", dataset)
    if not getattr(items, "class_to_idx", None):
        raise InputError(f"{place}: does not tell its classes")
    return items


def root_of(data: DataConfig) -> Path:
    """`data.root`, which must be a folder."""
    if data.root is None:
        raise InputError("data.root is not set: it names the folder with the training and the held-out images")
    if not Path(data.root).is_dir():
        raise InputError(f"data.root = {data.root}: no such folder")
    return Path(data.root)


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split, under the first of its names that is there."""
    return next((root / name for name in _names(split) if (root / name).is_dir()), None)


def _names(split: str) -> list[str]:
    synonyms = next((names for names in SPLIT_NAMES if split in names), ())
    return list(dict.fromkeys((split, *synonyms)))


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


def image_folder(root: Path, names: Sequence[str] = ()) -> ImageFiles:
    """The images directly in class folders.

    Images are numbered in the natural order of their paths, classes in that of their names, which is timm's order where
    timm has one.

    Args:
        names: of the class folders in their order, if that is known: all must be there, and no others.

    Raises:
        InputError: no class folders, one without an image, or an image that does not lie directly in one.
    """
    folders = (path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
    classes = {name: label for label, name in enumerate(names or sorted(folders, key=natural_order))}
    if not classes:
        raise InputError(f"{root}: has no class folders")
    labels = {os.path.join(root, name): label for name, label in classes.items()}
    files = ImageFiles(str(root), [], classes)
    for path in images_below(root, files.left_out):
        folder = os.path.dirname(path)
        if folder not in labels:
            some = f"{', '.join([*classes][:3])} … ({len(classes)})"
            raise InputError(f"{path}: an image must lie directly in a class folder of {root}: {some}")
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
