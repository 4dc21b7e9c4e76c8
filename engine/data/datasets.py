"""The images of a configuration: a folder's files in their order, or any other data set that timm can open."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset

from augsub.named_registry import did_you_mean
from engine.config import UNTRANSFORMED, Config, DataConfig
from engine.data.source import DataSource, build_digits, build_synthetic
from engine.data.transforms import build_transform
from engine.errors import InputError, first_line, input_errors
from engine.text import readable_name, readable_size

# The names under which the folder of a split is looked for: timm's, and test
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))
KINDS = ("torch", "hfds")  # timm's others, hfids, tfds and wds, are streams, in which no image has a number
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, and decodes none by itself
LABELS = ("targets", "labels", "_labels")  # where torchvision's sets have them


def build_source(config: Config, with_training: bool = True) -> DataSource:
    """The data set that `data.dataset` names; without its training images, these need not be there."""
    data = config.data
    if data.dataset in UNTRANSFORMED:
        for key in ("classes", "validation_share", "images_per_class", "cache"):
            if getattr(data, key):
                raise InputError(f"data.{key}: not with data.dataset = {data.dataset}, which is split and in memory")
    if data.dataset == "digits":
        return build_digits(data.image_size)
    if data.dataset == "synthetic":
        return build_synthetic(data.image_size, data.synthetic_samples)
    train = _open(data, data.train_split) if with_training or data.validation_share else None
    held_out = train if data.validation_share else _open(data, data.eval_split)
    classes = held_out.class_to_idx
    if train is not None and (differing := train.class_to_idx.items() ^ classes.items()):
        names = sorted({str(name) for name, _ in differing})
        raise InputError(f"data.root = {data.root}: the splits have different classes: {', '.join(names[:5])}")
    labels = _labels(data, classes)
    class_names = {labels[number]: readable_name(str(name)) for name, number in classes.items() if number in labels}
    if len(class_names) < 2:
        raise InputError(
            f"data.root = {data.root}: the only class is {', '.join(class_names.values())}, at least two are needed"
        )
    num_classes = max(class_names) + 1
    chosen = _chosen(data, train, held_out, [*labels])
    sets = {
        split: Images(
            items, build_transform(config.transform, data.image_size, is_training), split, chosen[split], labels
        )
        for split, items, is_training in (("training", train, True), ("held-out", held_out, False))
        if items is not None and (with_training or not is_training)
    }
    return DataSource(
        train=sets.get("training"),
        held_out=sets["held-out"],
        num_classes=num_classes,
        in_chans=3,
        class_names=[class_names.get(number, str(number)) for number in range(num_classes)],
    )


def _labels(data: DataConfig, classes: Mapping[Any, int]) -> dict[int, int]:
    """What the labels of a data set become: places in `data.classes`, or what they are."""
    if not data.classes:
        return {number: number for number in classes.values()}
    by_name = {readable_name(str(name)): number for name, number in classes.items()}
    for place, name in enumerate(data.classes):
        if name not in by_name:
            raise InputError(f"data.classes: {name} is none of the classes{did_you_mean(name, by_name)}")
        if name in data.classes[:place]:
            raise InputError(f"data.classes: {name} comes twice")
    return {by_name[name]: place for place, name in enumerate(data.classes)}


def _chosen(data: DataConfig, train: Any, held_out: Any, kept: Sequence[int]) -> dict[str, list[int] | None]:
    """Numbers of the training and the held-out images, in their order; None: all.

    Args:
        kept: labels, as the data set has them.
    """
    chosen: dict[str, list[int] | None] = {"training": None, "held-out": None}
    if train is not None and (data.classes or data.validation_share or data.images_per_class):
        labels, parts = labels_of(train), []
        if len(labels) != len(train):
            raise InputError(
                "data.classes, data.validation_share, data.images_per_class: need a data set that lists its labels, "
                f"{data.dataset} does not"
            )
        for label in kept:
            of_class = np.random.default_rng([label, 0]).permutation(np.flatnonzero(labels == label))
            count = math.ceil(data.validation_share * len(of_class))
            if 0 < count == len(of_class):
                raise InputError(f"data.validation_share = {data.validation_share}: leaves a class no training image")
            parts.append((of_class[count:][: data.images_per_class], of_class[:count]))
        chosen = {
            split: sorted(np.concatenate(of_split).tolist())
            for split, of_split in zip(chosen, zip(*parts, strict=True), strict=True)
        }
    if not data.validation_share:
        chosen["held-out"] = np.flatnonzero(np.isin(labels_of(held_out), kept)).tolist() if data.classes else None
    return chosen


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


def labels_of(items: Any) -> np.ndarray:
    """The labels (N,) of a data set in its order; none if it does not list them."""
    if isinstance(items, ImageFiles):
        return np.array([label for _, label in items.samples])
    if hasattr(items, "label_key"):  # timm's reader of Hugging Face's data sets
        return np.asarray(items.dataset[items.label_key])
    return np.asarray(next((getattr(items, name) for name in LABELS if hasattr(items, name)), ()))


class Images(Dataset):
    """Pairs (transformed image, label), of which one that cannot be read is an UnreadableImage.

    Args:
        items: pairs (open file or image, label) by number: ImageFiles, a reader of timm's, a data set of torchvision.
        transform: of an RGB image.
        split: what images of a data set that is no folder are called by, beside their number.
        chosen: numbers of those to take; None: all.
        labels: what labels become; None: they stay.
    """

    def __init__(
        self,
        items: Any,
        transform: Callable[[Image.Image], Any],
        split: str,
        chosen: Sequence[int] | None = None,
        labels: Mapping[int, int] | None = None,
    ) -> None:
        self._items, self._transform, self._split, self._labels = items, transform, split, labels or {}
        self._numbers = range(len(items)) if chosen is None else chosen
        self._decoded: DecodedImages | None = None
        self.left_out: Counter[str] = getattr(items, "left_out", Counter())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._decode(index) if self._decoded is None else self._decoded[index]
        return self._transform(image), label

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        number = self._numbers[index]
        try:
            source, label = self._items[number]
            with source:
                return decode(source), self._labels.get(int(label), int(label))
        except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
            is_file = isinstance(self._items, ImageFiles)
            name = self._items.samples[number][0] if is_file else f"{self._split} image {number}"
            is_other = isinstance(error, UnidentifiedImageError)  # which tells of a Python object
            raise UnreadableImage(name, "not an image that Pillow knows" if is_other else first_line(error)) from error

    def decode_all(self) -> None:
        """Decode every image now, unless it was done, and keep it; the processes of a loader share them.

        Raises:
            InputError: they would take more than a quarter of the machine's memory.
        """
        if self._decoded is None:
            with input_errors(f"data.cache = ram: the {self._split} images"):
                self._decoded = DecodedImages.of(self._decode, len(self))

    def seen_through(self, change: Callable[[Callable[[Image.Image], Any]], Callable[[Image.Image], Any]]) -> Images:
        """The same images, what is decoded too, with another transform that `change` makes of theirs."""
        images = copy.copy(self)
        images._transform = change(self._transform)
        return images

    @property
    def labels(self) -> np.ndarray:
        """Of all images, (N,); none if the data set does not list them."""
        labels = labels_of(self._items)
        own = labels[list(self._numbers)].tolist() if len(labels) else []
        return np.array([self._labels.get(label, label) for label in own], dtype=np.int64)

    def listing(self) -> Iterator[str]:
        """A line for each image: of files path and label, else the label; nothing if the data set lists none."""
        if isinstance(self._items, ImageFiles):
            samples = (self._items.samples[number] for number in self._numbers)
            return (f"{path.removeprefix(self._items.root)}\0{label}" for path, label in samples)
        labels = labels_of(self._items)
        return map(str, labels[list(self._numbers)].tolist() if len(labels) else ())


@dataclass
class DecodedImages:
    """Pairs (RGB image, label) by number, in one piece of memory, which forked and spawned processes share.

    Attributes:
        pixels: of all images one after the other, uint8.
        ends: where the pixels of each image end, (N,).
        sizes: width and height, (N, 2).
        labels: (N,).
        unreadable: by number, the images that could not be decoded.
    """

    SAMPLE: ClassVar[int] = 256  # images, at least, from which the memory of all is foretold
    pixels: Tensor
    ends: Tensor
    sizes: Tensor
    labels: Tensor
    unreadable: dict[int, tuple[str, str]]

    @classmethod
    def of(cls, decode: Callable[[int], tuple[Image.Image, int]], count: int) -> DecodedImages:
        """Decode so many images, by as many threads as there are cores; ValueError if memory is short."""
        unreadable: dict[int, tuple[str, str]] = {}

        def pixels_and_label(number: int) -> tuple[np.ndarray, int]:
            try:
                image, label = decode(number)
            except UnreadableImage as error:
                unreadable[number] = error.args
                return np.zeros((0, 0, 3), np.uint8), -1
            return np.asarray(image), label

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            some = range(0, count, max(1, count // cls.SAMPLE))
            needed = count * sum(pixels.nbytes for pixels, _ in pool.map(pixels_and_label, some)) // len(some)
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if 2 * needed > memory / 2:  # all are there twice for a moment
                raise ValueError(
                    f"{count} of them need about {readable_size(needed)}, a quarter of this machine's memory is "
                    f"{readable_size(memory // 4)}: leave it unset"
                )
            images, labels = zip(*pool.map(pixels_and_label, range(count)), strict=True)
        sizes = torch.tensor([image.shape[1::-1] for image in images])
        flat = np.concatenate([image.reshape(-1) for image in images])
        return cls(torch.from_numpy(flat), (3 * sizes.prod(1)).cumsum(0), sizes, torch.tensor(labels), unreadable)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        if number in self.unreadable:
            raise UnreadableImage(*self.unreadable[number])
        end, (width, height) = int(self.ends[number]), self.sizes[number].tolist()
        pixels = self.pixels[end - 3 * width * height : end].view(height, width, 3)
        return Image.fromarray(pixels.numpy()), int(self.labels[number])
