"""Parquet files with images and labels in their rows, as the hub of Hugging Face has them: a row group is a shard."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from engine.config import DataConfig
from engine.data.files import parquet
from engine.data.images import UnreadableImage
from engine.data.remote import is_remote, split_places
from engine.data.stream import STREAMS
from engine.errors import InputError, first_line, input_errors


def open_parquet(data: DataConfig, split: str) -> ParquetImages:
    """The images of a split; InputError: no files, or without the columns that are needed."""
    columns = {"image": "image", "label": "label", **data.columns}
    places = split_places(data, split, ".parquet", folders=("", "data/"))
    return ParquetImages(places, columns["image"], columns["label"])


class ParquetImages:
    """Images in the rows of Parquet files: pairs (their bytes as a file, label or tuple of labels) by number.

    Attributes:
        shards: in which row group each image lies, counted over all files, (N,).
        labels: of all images; tuples where a row lists several.
        class_to_idx: labels by name of their class.
        has_numbers_alone: whether classes have no other names than their numbers.

    Args:
        places: paths or URLs.
        image: the column of images: bytes, or what the hub has, {bytes, path}.
        label: the column of numbers, names or lists of them.

    Raises:
        InputError: a file that is none, or has no such columns.
    """

    def __init__(self, places: Sequence[str], image: str, label: str) -> None:
        self._image, lengths, values = image, [], []
        self._groups: list[tuple[str, int]] = []  # file and number in it
        names: Sequence[str] | None = None
        for place in places:
            # pyarrow's, or of as many packages as there are protocols
            with input_errors(f"{place}: cannot be read as Parquet", Exception):
                file = _open(place)
                schema, metadata = file.schema_arrow, file.metadata
                missing = [name for name in (image, label) if name not in schema.names]
                if missing:
                    known = ", ".join(schema.names)
                    raise InputError(f"{place}: has no column {missing[0]} (data.columns), but {known}")
                values += file.read([label]).column(label).to_pylist()
            self._groups += [(place, number) for number in range(metadata.num_row_groups)]
            lengths += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            names = names or _class_names(schema.metadata or {}, label)
        self.shards = np.repeat(np.arange(len(lengths)), lengths)
        self._first = np.cumsum([0, *lengths])
        self.has_numbers_alone, self.class_to_idx, self.labels = _numbered(values, names, f"{places[0]}: {label}")
        self._opened: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[BinaryIO, Any]:
        group = int(self.shards[number])
        value = self._read(group)[number - int(self._first[group])].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"the column {self._image} holds no bytes")
        return io.BytesIO(content), self.labels[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": OrderedDict()}  # another process reads its own

    def name_of(self, number: int) -> str:
        """What a message calls an image."""
        place, group = self._groups[int(self.shards[number])]
        return f"{place}: row {number - int(self._first[self.shards[number]])} of row group {group}"

    def _read(self, group: int) -> Any:
        """The images of a row group: one of each stream is in memory at a time."""
        column = self._opened.get(group)
        if column is None:
            place, number = self._groups[group]
            try:
                column = _open(place).read_row_group(number, [self._image]).column(self._image)
            except Exception as error:  # pyarrow's, or of as many packages as there are protocols
                raise UnreadableImage(f"{place}, row group {number}", first_line(error)) from error
            self._opened[group] = column
            if len(self._opened) > STREAMS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(group)
        return column


def _open(place: str) -> Any:
    if not is_remote(place):
        return parquet().ParquetFile(place)
    import fsspec

    return parquet().ParquetFile(fsspec.open(place).open())


def _class_names(metadata: Mapping[bytes, bytes], label: str) -> Sequence[str] | None:
    """Those that the hub's libraries have written of a column with numbers."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(label, {})
    return feature.get("names") or feature.get("feature", {}).get("names")


def _numbered(
    values: Sequence[Any], names: Sequence[str] | None, place: str
) -> tuple[bool, Mapping[str, int], Sequence[Any]]:
    """Whether classes have numbers alone, their numbers by name, and labels as numbers or tuples of them."""
    has_several = any(isinstance(value, list) for value in values)
    rows = values if has_several else [[value] for value in values]
    flat = [value for row in rows for value in row]
    if any(not isinstance(value, int | str) or isinstance(value, bool) for value in flat):
        raise InputError(f"{place}: allowed are numbers of classes, their names, or lists of them, in every row")
    if any(isinstance(value, str) for value in flat):
        names = sorted({str(value) for value in flat})
        number = {name: place for place, name in enumerate(names)}
        rows = [[number[str(value)] for value in row] for row in rows]
    elif flat and min(flat) < 0:
        raise InputError(f"{place}: {min(flat)} is no label: allowed are numbers of classes from 0 on")
    largest = max((value for row in rows for value in row), default=-1)
    if names is not None and largest >= len(names):
        raise InputError(f"{place}: the label {largest} is beyond the {len(names)} classes")
    known = names or [str(number) for number in range(largest + 1)]
    labels: Sequence[Any] = [tuple(row) for row in rows] if has_several else np.array([row[0] for row in rows])
    return names is None, {name: number for number, name in enumerate(known)}, labels
