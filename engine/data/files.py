"""Image files on the disk: which ones there are, in which order; in class folders, or named by a table."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from engine.config import SPLIT_NAMES
from engine.errors import InputError, input_errors

NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, and decodes none by itself
SHOWN = 3  # names in a message
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "False": False, "True": True}  # as files write them
Row = dict[str, Any]


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
        samples: pairs (path, label), or where images have several labels, or none, (path, tuple of labels).
        class_to_idx: labels by name of their class.
        left_out: how many files and hidden folders beside the images were left out, by suffix.
        table: the file that names them; None of class folders.
        splits: of a table's rows; None where there is no such column.
    """

    root: str
    samples: list[tuple[str, Any]]
    class_to_idx: Mapping[str, int]
    left_out: Counter[str] = field(default_factory=Counter)
    table: Path | None = None
    splits: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, Any]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    @property
    def labels(self) -> list[Any]:
        """Of all images, in their order."""
        return [label for _, label in self.samples]

    def name_of(self, index: int) -> str:
        """What a message calls an image."""
        return self.samples[index][0]

    def path_of(self, index: int) -> str:
        """The path of an image from `root` on."""
        return self.samples[index][0].removeprefix(self.root)

    def name_of_split(self, split: str) -> str | None:
        """The first of a split's names that a row of the table has; None if none has one."""
        return next((name for name in split_names(split) if name in self.splits), None)

    def files_of(self, split: str) -> ImageFiles:
        """The images in a table's rows of a split, under the first of its names that a row has.

        Rows of a split of a name that nobody looks for, or of another one of its names, count as left out.

        Raises:
            InputError: there is none.
        """
        names, found = split_names(split), self.name_of_split(split)
        own = [sample for sample, of_row in zip(self.samples, self.splits, strict=True) if of_row == found]
        if found is None:
            there = ", ".join(sorted({str(name) for name in self.splits if name is not None})) or "no column tells it"
            raise InputError(
                f"data.table = {self.table}: no row of the split {split} ({', '.join(names)}), but {there}"
            )
        usual = {name for names in SPLIT_NAMES for name in names}
        passed_over = {name for name in self.splits if name not in usual} if found in usual else set()
        passed_over |= {*names} - {found}
        left_out = Counter(f"rows of the split {name}" for name in self.splits if name in passed_over)
        return ImageFiles(self.root, own, self.class_to_idx, left_out)


def image_folder(root: Path, names: Sequence[str] = (), leaves_out_others: bool = False) -> ImageFiles:
    """The images directly in class folders.

    Images are numbered in the natural order of their paths, classes in that of their names, which is timm's order where
    timm has one.

    Args:
        names: of the class folders in their order, if that is known: all must be there, and no others.
        leaves_out_others: whether images outside of these folders are left out instead of refused.

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
            if leaves_out_others:
                continue
            some = f"{', '.join([*classes][:3])} … ({len(classes)})"
            raise InputError(f"{path}: an image must lie directly in a class folder of {root}: {some}")
        files.samples.append((path, labels[folder]))
    filled = {label for _, label in files.samples}
    for folder, label in labels.items():
        if label not in filled:
            raise InputError(f"{folder}: the class folder holds no image")
    files.samples.sort(key=lambda sample: natural_order(sample[0]))
    return files


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split, under the first of its names that is there."""
    return next((root / name for name in split_names(split) if (root / name).is_dir()), None)


def split_names(split: str) -> list[str]:
    """Under which names a split is looked for, its own first."""
    synonyms = next((names for names in SPLIT_NAMES if split in names), ())
    return list(dict.fromkeys((split, *synonyms)))


def read_table(file: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a .csv, .parquet or .jsonl file by name of their columns.

    Raises:
        InputError: it cannot be read, or one of the columns is missing.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with input_errors(str(file)):
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            rows = parquet().read_table(file).to_pylist()
        elif suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
        else:
            rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    for column in columns if rows else ():
        if column not in rows[0]:
            raise InputError(f"{file}: has no column {column}, but {', '.join(map(str, rows[0]))}")
    return rows


def parquet() -> Any:
    """pyarrow's module of that name, InputError where it is not installed."""
    with input_errors("Parquet needs another package, pip install 'augsub[parquet]'"):
        from pyarrow import parquet
    return parquet


def image_table(
    file: Path, root: Path, path: str, labels: str | tuple[str, ...], split: str, needs_split: bool, separator: str
) -> ImageFiles:
    """The images in all rows of a table, checked as a whole.

    Args:
        root: to which paths are relative.
        path, labels, split: the names of columns; of several ones for the labels each is a class, with 0 or 1.
        needs_split: whether that column must be there.
        separator: between the labels of an image in one column.

    Raises:
        InputError: a column or a file is missing, a path comes twice, or a column of a class holds something else.
    """
    one_column = isinstance(labels, str)
    rows = read_table(file, [path, *([labels] if one_column else labels), *([split] if needs_split else ())])
    if not rows:
        raise InputError(f"{file}: holds no row")
    paths = [os.path.join(root, str(row[path])) for row in rows]
    twice = [name for name, count in Counter(paths).items() if count > 1]
    _refuse(file, "images come twice", twice)
    _refuse(file, "files are missing", [name for name in paths if not os.path.isfile(name)])
    if one_column:
        of_images = [_labels_in(row[labels], separator) for row in rows]
        classes = sorted({word for own in of_images for word in own}, key=natural_order)
    else:
        wrong = [
            f"{row[path]} ({name} = {row[name]})" for row in rows for name in labels if str(row[name]) not in FLAGS
        ]
        _refuse(file, "values are neither 0 nor 1", wrong)
        of_images, classes = [[name for name in labels if FLAGS[str(row[name])]] for row in rows], [*labels]
    number = {name: place for place, name in enumerate(classes)}
    samples = [(name, tuple(number[word] for word in own)) for name, own in zip(paths, of_images, strict=True)]
    splits = [None if row.get(split) is None else str(row[split]).strip() for row in rows]
    return ImageFiles(str(root), samples, number, table=file, splits=splits)


def _labels_in(cell: Any, separator: str) -> list[str]:
    """The labels in a cell of a table, each once: a list's, a text's, or a number; none in an empty one."""
    parts = cell if isinstance(cell, list) else [] if cell is None else str(cell).split(separator)
    return [label for label in dict.fromkeys(str(part).strip() for part in parts) if label]


def _refuse(file: Path, problem: str, found: Sequence[str]) -> None:
    if found:
        more = ", …" if len(found) > SHOWN else ""
        raise InputError(f"data.table = {file}: {len(found)} {problem}: {', '.join(found[:SHOWN])}{more}")
