"""Image files: which files are images, how they and their classes are numbered, and what cannot be read of them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

from engine.errors import InputError

HIDDEN = "hidden"
NO_PICTURES = ("MPEG",)  # Pillow knows these files and decodes none
GHOSTSCRIPT = ("EPS",)  # it decodes these where Ghostscript is installed


class UnreadableImage(Exception):
    """A data set cannot give an image; raised with its name and the reason."""


class DecodingError(Exception):
    """A file holds no whole image; the message is the reason, in a few words."""


def decode(file: BinaryIO) -> Image.Image:
    """The image in an open file, or its first frame, as RGB.

    Pixels are as they are stored: an EXIF orientation is not applied, as timm and torchvision do not. Weights are
    pretrained and published numbers measured without it, and whoever predicts with timm later sees the same.

    Raises:
        DecodingError: not an image, a part of one, or one that is too large to be one.
    """
    try:
        return to_rgb(Image.open(file))
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
        raise DecodingError(_reason(error, file)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue; transparency is dropped, as timm and torchvision do.

    Pillow's own conversion would clip 16-bit and floating-point pixels at 255.
    """
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        ranges = (1, 255, 65535) if image.mode == "F" else (65535,)  # a file of floats does not tell its range
        return Image.fromarray(_to_8_bits(np.asarray(image).astype(np.float64), ranges)).convert("RGB")
    image.load()
    image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn that it is lost
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, ranges: Sequence[int]) -> np.ndarray:
    """The nearest of 256 values, (H, W), of the first range from 0 that holds all; else between the extremes."""
    finite = pixels[np.isfinite(pixels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    pixels = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
    for brightest in ranges:
        if low >= 0 and high <= brightest:
            return np.rint(pixels * (255 / brightest)).astype(np.uint8)
    return np.rint((pixels - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


def reason_of(error: Exception) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reason(error: Exception, file: BinaryIO) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return reason_of(error)
    return "not an image that Pillow knows" if file.seek(0, os.SEEK_END) else "the file is empty"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of all files that Pillow decodes here, in lower case, with their dot."""
    Image.init()
    decoded = {"MPO"} | {  # which the JPEG reader opens: a photograph and its preview, or the two of a stereo camera
        name
        for name, (opener, _) in Image.OPEN.items()
        if not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))  # these identify only
        and name not in NO_PICTURES
        and (name not in GHOSTSCRIPT or shutil.which("gs"))
    }
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


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in their order.

    Raises:
        InputError: there is none.
    """
    classes = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        raise InputError(f"{folder}: has no class folders")
    return sorted(classes, key=natural_order)


class ImageList(Reader):
    """Image files with labels, as a reader of timm's: pairs (open file, label) by number.

    Args:
        root: folder to which names are relative.
        samples: pairs (path, label).

    Attributes:
        left_out: how many files and hidden folders beside the images were left out, by suffix or `HIDDEN`.
    """

    def __init__(self, root: Path, samples: list[tuple[str, int]]) -> None:
        super().__init__()
        self.root = str(root)
        self.samples = samples
        self.left_out: Counter[str] = Counter()

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class ImageFolder(ImageList):
    """The images directly in class folders.

    Hidden files and folders, and files that are no images, are left out. Images are numbered in the natural order of
    their paths, classes in that of their names, which is timm's order where timm has one.

    Args:
        root: folder of the class folders.
        class_to_idx: labels by class folder, of which each must be there; None numbers the folders.

    Raises:
        InputError: no class folders, one without an image, or an image that does not lie directly in a class folder.
    """

    def __init__(self, root: Path, class_to_idx: Mapping[str, int] | None = None) -> None:
        super().__init__(root, [])
        self.class_to_idx = dict(class_to_idx or {name: label for label, name in enumerate(class_folders(root))})
        self._leave_out(entry for entry in os.scandir(root) if entry.name not in self.class_to_idx)
        names = [f"{folder}/{name}" for folder in self.class_to_idx for name in self._images_in(root / folder)]
        self.samples = [
            (os.path.join(self.root, name), self.class_to_idx[name.partition("/")[0]])
            for name in sorted(names, key=natural_order)
        ]

    def _images_in(self, folder: Path) -> list[str]:
        images, others = [], []
        for entry in os.scandir(folder):
            (images if is_image(entry.name) and not entry.is_dir() else others).append(entry)
        if not images:
            found = ", ".join(
                sorted({_suffix(entry.name) for entry in others if entry.is_file() and entry.name[0] != "."})
            )
            raise InputError(f"{folder}: the class folder holds no image itself{found and f', only files {found}'}")
        self._leave_out(others)
        return [entry.name for entry in images]

    def _leave_out(self, entries: Iterable[os.DirEntry[str]]) -> None:
        """Count what is no image, and refuse what is."""
        for entry in entries:
            if entry.name.startswith("."):
                self.left_out[HIDDEN] += 1
            elif entry.is_dir():
                self._leave_out(os.scandir(entry.path))
            elif is_image(entry.name):
                raise InputError(f"{entry.path}: an image must lie directly in a class folder of {self.root}")
            else:
                self.left_out[_suffix(entry.name)] += 1


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without suffix"


def naming_bad_files(dataset: Dataset, split: str) -> Dataset:
    """The data set of (image, label), from which an image that cannot be read is an UnreadableImage.

    Args:
        dataset: any map-style data set, its transform set.
        split: what images without a name are called by, beside their index.
    """
    return ImageFiles(dataset, split) if isinstance(dataset, ImageDataset) else OtherImages(dataset, split)


class ImageFiles(Dataset):
    """The files of timm's ImageDataset, which itself would replace a bad file by its neighbour in silence."""

    def __init__(self, dataset: ImageDataset, split: str) -> None:
        self._reader, self._transform = dataset.reader, dataset.transform
        self._split = split

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, label = self._reader[index]
            with file:
                image = decode(file)
        except (OSError, tarfile.TarError, DecodingError) as error:
            raise UnreadableImage(self._name(index), reason_of(error)) from error
        try:
            return self._transform(image), label
        except DecodingError as error:  # any other error of a transform is none of the file
            raise UnreadableImage(self._name(index), reason_of(error)) from error

    def listing(self) -> Iterator[str]:
        """A line for each image: of files path and label, else the label."""
        if hasattr(self._reader, "samples"):
            return (f"{path.removeprefix(self._reader.root)}\0{label}" for path, label in self._reader.samples)
        return map(str, self._reader.dataset[self._reader.label_key])

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files beside the images were left out, by suffix."""
        return getattr(self._reader, "left_out", {})

    def _name(self, index: int) -> str:
        return self._reader.filename(index, absolute=True) or f"{self._split} image {index}"


class OtherImages(Dataset):
    """Data sets that open their images themselves; names are unknown."""

    LABELS = ("targets", "labels", "_labels")  # where torchvision's sets have them

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._dataset = dataset
        self._split = split

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except (OSError, Image.DecompressionBombError, DecodingError) as error:  # the first: UnidentifiedImageError too
            raise UnreadableImage(f"{self._split} image {index}", reason_of(error)) from error

    def listing(self) -> Iterator[str]:
        """The label of each image; nothing if the data set does not list them."""
        labels = next((getattr(self._dataset, name) for name in self.LABELS if hasattr(self._dataset, name)), ())
        return map(str, np.asarray(labels).tolist())
