"""Folders of images: which files are images, and in which order they and their classes are numbered."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile
from timm.data.readers.reader import Reader

from engine.errors import InputError

HIDDEN = "hidden"
NO_PICTURES = ("MPEG",)  # Pillow knows these files and decodes none
GHOSTSCRIPT = ("EPS",)  # it decodes these where Ghostscript is installed


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
