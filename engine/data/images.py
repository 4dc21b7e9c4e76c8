"""Images with labels, transformed: of files, shards or any data set that timm can open."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from engine.config import PHOTOGRAPHS, RGB, DataConfig, image_channels
from engine.distributed import memory_of
from engine.errors import first_line, input_errors
from engine.text import readable_size

IGNORED = -1  # label of what is no image: it fills a share, or stands for a file that cannot be read
LABELS = ("labels", "targets", "_labels")  # where data sets have them
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how files begin, the last two those of more than 4 GB
LAST_UPRIGHT = 4  # EXIF's orientations above it change width and height
AS_TIMM = DataConfig()  # decodes as timm and torchvision do, which weights and published numbers go by
AS_TIMM.freeze()


class UnreadableImage(Exception):
    """A data set cannot give an image; raised with its name and the reason."""


@dataclass(frozen=True)
class Needed:
    """What a transform needs of an image that is not decoded yet.

    Attributes:
        divisor: by which a JPEG's sides may be divided, 1, 2, 4 or 8.
        box: left, top, right and lower edge of the part that is looked at, in shares of the sides; None: all of it.
    """

    BOX: ClassVar[str] = "box"  # what an image's `info` calls it
    divisor: int = 1
    box: tuple[float, float, float, float] | None = None


def decode(
    source: BinaryIO | Image.Image,
    data: DataConfig = AS_TIMM,
    needed: Callable[[tuple[int, int]], Needed] | None = None,
) -> Image.Image | Tensor:
    """An image, or the first one in an open file, as eight bits of red, green and blue, or grey, or all its channels.

    Transparency is dropped, as timm and torchvision do. Sixteen bits become the nearest eight: Pillow's own conversion
    would clip them at 255.

    Args:
        data: says how many channels, which orientation, and how many pixels at most.
        needed: of (width, height) of an image what is looked at, so that a JPEG is decoded at a reduced scale; it is
            told to the transform in the image's `info`.

    Raises:
        ValueError: more pixels than allowed; on damaged bytes Pillow's decoders raise whatever they stumble over.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, a warning and at twice as many an error
    if image_channels(data) not in PHOTOGRAPHS:
        return _decode_channels(source, data)
    image = source if isinstance(source, Image.Image) else Image.open(source)
    width, height = image.size
    _refuse_too_many(width, height, data)
    turns = data.exif_orientation and image.format != "TIFF"  # which Pillow turns itself
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if turns else 1
    asked = Needed()
    if needed is not None:
        asked = needed((height, width) if orientation > LAST_UPRIGHT else (width, height))
        image.draft(None, (width // asked.divisor, height // asked.divisor))
    image.load()
    image = image if orientation == 1 else ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.mode == "F" and 0 < image.getextrema()[1] <= 1:
        raise ValueError("has float pixels between 0 and 1, which Pillow takes for black: save it with 8 or 16 bits")
    image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn that it is lost
    image = image.convert(mode_of(data))
    image.info[Needed.BOX] = asked.box
    return image


def _refuse_too_many(width: int, height: int, data: DataConfig) -> None:
    if width * height > data.max_megapixels * 1e6:
        allowed = f"data.max_megapixels = {data.max_megapixels:g} allows"
        raise ValueError(f"{width} x {height} pixels are {width * height / 1e6:.1f} million, more than {allowed}")


def _decode_channels(source: BinaryIO | Image.Image, data: DataConfig) -> Tensor:
    """All channels of an image (C, H, W) float32, for timm's crops and flips: a satellite's, or with transparency.

    Integers are between 0 and 1 by the range of their type; floats stay as they are.

    Raises:
        ValueError: other channels or more pixels than the configuration says.
    """
    pixels = _tiff(source) if not isinstance(source, Image.Image) and _is_tiff(source) else _frames(source)
    channels, height, width = pixels.shape
    if channels != image_channels(data):
        raise ValueError(f"has {channels} channels, data.in_chans = {image_channels(data)}")
    _refuse_too_many(width, height, data)
    if pixels.dtype.kind in "ui":
        pixels = pixels / np.float32(np.iinfo(pixels.dtype).max)
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


def _is_tiff(source: BinaryIO) -> bool:
    start = source.read(4)
    source.seek(0)
    return start in TIFF


def _tiff(source: BinaryIO) -> np.ndarray:
    """The first series of a TIFF file, (C, H, W), whether its channels are pages or lie in each pixel."""
    with input_errors("TIFF needs another package, pip install 'augsub[tiff]'"):
        from tifffile import TiffFile  # Pillow knows no pixels of more than four channels
    with TiffFile(source) as file:
        series = file.series[0]
        pixels, axes = series.asarray(), series.axes
    pixels = np.moveaxis(pixels, (axes.index("Y"), axes.index("X")), (-2, -1))
    return pixels.reshape(-1, *pixels.shape[-2:])


def _frames(source: BinaryIO | Image.Image) -> np.ndarray:
    """The bands of all frames that Pillow finds, (C, H, W)."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    frames = [np.atleast_3d(np.asarray(frame)) for frame in ImageSequence.Iterator(image)]
    return np.concatenate(frames, axis=-1).transpose(2, 0, 1)


def mode_of(data: DataConfig) -> str:
    """Pillow's name of a photograph's channels."""
    return "RGB" if image_channels(data) == RGB else "L"


def labels_of(items: Any) -> Sequence[Any]:
    """Labels of a data set in its order, tuples of them where images have several; none if it does not list them."""
    if hasattr(items, "label_key"):  # timm's reader of Hugging Face's data sets
        return items.dataset[items.label_key]
    labels = next((getattr(items, name) for name in LABELS if hasattr(items, name)), ())
    return labels.tolist() if hasattr(labels, "tolist") else labels


class Images(Dataset):
    """Pairs (transformed image, target), of which one that cannot be read is an UnreadableImage.

    Args:
        items: pairs (open file or image, label) by number: files, shards, what timm or torchvision opens.
        transform: of an RGB image.
        split: what images of a data set that knows no names are called by, beside their number.
        chosen: numbers of those to take; None: all.
        labels: what labels become; None: they stay.
        num_classes: K, of images with several labels, or none, whose targets are (K,) of 0 and 1; None: each has one,
            and its number is the target.
        data: says how files become images.
    """

    def __init__(
        self,
        items: Any,
        transform: Callable[[Image.Image], Any],
        split: str,
        chosen: Sequence[int] | None = None,
        labels: Mapping[int, int] | None = None,
        num_classes: int | None = None,
        data: DataConfig = AS_TIMM,
    ) -> None:
        self._items, self._transform, self._split, self._labels = items, transform, split, labels or {}
        self._numbers = range(len(items)) if chosen is None else chosen
        self._num_classes, self._data = num_classes, data
        self._decoded: DecodedImages | None = None
        self.left_out: Counter[str] = getattr(items, "left_out", Counter())
        self.damaged: Sequence[tuple[str, str]] = getattr(items, "damaged", ())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Any, int | Tensor]:
        image, label = self._decode(index) if self._decoded is None else self._decoded[index]
        return self._transform(image), self._target(label)

    def _decode(self, index: int) -> tuple[Image.Image, Any]:
        number = self._numbers[index]
        try:
            source, label = self._items[number]
            with source:
                return decode(source, self._data, needed_by(self._transform)), label
        except UnreadableImage:  # of a whole shard
            raise
        except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
            name_of = getattr(self._items, "name_of", f"{self._split} image {{}}".format)
            is_other = isinstance(error, UnidentifiedImageError)  # which tells of a Python object
            reason = "not an image that Pillow knows" if is_other else first_line(error)
            raise UnreadableImage(name_of(number), reason) from error

    def _target(self, label: Any) -> int | Tensor:
        if self._num_classes is None:
            number = int(*several(label))
            return self._labels.get(number, number)
        target = torch.zeros(self._num_classes)
        target[[self._labels.get(int(one), int(one)) for one in several(label)]] = 1
        return target

    def decode_all(self) -> None:
        """Decode every image now, unless it was done, and keep it; the processes of a loader share them.

        Raises:
            InputError: they would take more than a quarter of the machine's memory.
        """
        if self._decoded is None:
            with input_errors(f"data.cache = ram: the {self._split} images"):
                self._decoded = DecodedImages.of(self._decode, len(self), mode_of(self._data))

    def seen_through(self, change: Callable[[Callable[[Image.Image], Any]], Callable[[Image.Image], Any]]) -> Images:
        """The same images, what is decoded too, with another transform that `change` makes of theirs."""
        images = copy.copy(self)
        images._transform = change(self._transform)
        return images

    @property
    def labels(self) -> np.ndarray:
        """Of all images, (N,), or of several ones (N, K) of 0 and 1; none if the data set does not list them."""
        labels = labels_of(self._items)
        targets = [self._target(labels[number]) for number in self._numbers] if len(labels) else []
        return np.array(targets, dtype=np.int64) if self._num_classes is None else np.stack(targets)

    @property
    def shards(self) -> np.ndarray | None:
        """In which shard each image lies, (N,); None if they lie in none."""
        shards = getattr(self._items, "shards", None)
        return None if shards is None else shards[np.asarray(self._numbers)]

    def listing(self) -> Iterator[str]:
        """A line for each image: of files path and label, else the label; nothing if the data set lists none."""
        labels = labels_of(self._items)
        numbers = self._numbers if len(labels) else ()
        if hasattr(self._items, "path_of"):
            return (f"{self._items.path_of(number)}\0{labels[number]}" for number in numbers)
        return (str(labels[number]) for number in numbers)


def needed_by(transform: Any) -> Callable[[tuple[int, int]], Needed] | None:
    """What says which part of an image a transform looks at; None where all of it is decoded."""
    transform = getattr(transform, "transform", transform)  # a corruption's
    first = next(iter(getattr(transform, "transforms", ())), None)
    return getattr(first, "needed", None)


def several(label: Any) -> Sequence[int]:
    """One label, or several, as several."""
    return label if isinstance(label, tuple) else (label,)


@dataclass
class DecodedImages:
    """Pairs (image, label) by number, in one piece of memory, which forked and spawned processes share.

    Attributes:
        pixels: of all images one after the other, uint8.
        ends: where the pixels of each image end, (N,).
        sizes: height, width and channels, (N, 3), or (N, 2) of grey images.
        labels: as the data set has them.
        unreadable: by number, the images that could not be decoded.
    """

    SAMPLE: ClassVar[int] = 256  # images, at least, from which the memory of all is foretold
    pixels: Tensor
    ends: Tensor
    sizes: Tensor
    labels: Sequence[Any]
    unreadable: dict[int, tuple[str, str]]

    @classmethod
    def of(cls, decode: Callable[[int], tuple[Image.Image, Any]], count: int, blank: str) -> DecodedImages:
        """Decode so many images, by as many threads as there are cores; ValueError if memory is short.

        Args:
            blank: Pillow's mode of the images.
        """
        unreadable: dict[int, tuple[str, str]] = {}

        def pixels_and_label(number: int) -> tuple[np.ndarray, Any]:
            try:
                image, label = decode(number)
            except UnreadableImage as error:
                unreadable[number] = error.args
                return np.asarray(Image.new(blank, (0, 0))), -1
            return np.asarray(image), label

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            some = range(0, count, max(1, count // cls.SAMPLE))
            needed = count * sum(pixels.nbytes for pixels, _ in pool.map(pixels_and_label, some)) // len(some)
            memory, processes = memory_of(torch.device("cpu")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if 2 * needed * processes > memory / 2:  # all are there twice for a moment
                times = f" times {processes} processes" if processes > 1 else ""
                raise ValueError(
                    f"{count} of them need about {readable_size(needed)}{times}, a quarter of this machine's memory is "
                    f"{readable_size(memory // 4)}: leave it unset"
                )
            images, labels = zip(*pool.map(pixels_and_label, range(count)), strict=True)
        sizes = torch.tensor([image.shape for image in images])
        flat = np.concatenate([image.reshape(-1) for image in images])
        return cls(torch.from_numpy(flat), sizes.prod(1).cumsum(0), sizes, labels, unreadable)

    def __getitem__(self, number: int) -> tuple[Image.Image, Any]:
        if number in self.unreadable:
            raise UnreadableImage(*self.unreadable[number])
        end, size = int(self.ends[number]), self.sizes[number].tolist()
        pixels = self.pixels[end - math.prod(size) : end].view(size)
        return Image.fromarray(pixels.numpy()), self.labels[number]
