"""Images in files that hold many: tar files as WebDataset has them, and Parquet files as the hub of Hugging Face does.

In a tar file members of one name up to its first point are a sample: an image, and in .cls the number of its class, or
several numbers. Where each image lies is known from an index beside the shards, which `tools/prepare_data.py` writes,
or found out once and kept in `cache_folder()`. So an epoch's order can be a function of seed and epoch
(engine/data/stream.py), and a run goes on without reading what it has seen. A shard that lies elsewhere is copied as a
whole when the first of its images is asked for. Of Parquet files a row group is a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse, groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from engine import atomic
from engine.config import DataConfig
from engine.data.files import is_image, parquet
from engine.data.images import UnreadableImage
from engine.data.remote import PIPE, Copies, alone, cache_folder, fetch, is_remote, split_places
from engine.data.stream import STREAMS
from engine.errors import InputError, first_line, input_errors
from engine.text import to_json

INDEX = "index.npz"
RULES = 2  # by which shards are scanned: an index that was kept by others does not count
LABEL = "cls"  # the suffix of a sample's label
READING = threading.Lock()  # who opens a shard may close another one, from which no other thread must read then


class ImagesInShards:
    """Pairs (an image's bytes as a file, label or tuple of labels) by number, of shards that are opened as a whole.

    Attributes:
        shards: in which shard each image lies, (N,).
        labels: of all images.
        class_to_idx: labels by name of their class.
        has_numbers_alone: whether classes have no other names than their numbers.

    Args:
        names: of the shards, for messages.
        lengths: images in each of them.
        largest: of all labels; -1 if there are none.
        classes: their names by number, if they are known.

    Raises:
        InputError: labels beyond the classes.
    """

    def __init__(
        self, names: Sequence[str], lengths: Sequence[int], labels: Sequence[Any], largest: int, classes: Sequence[str]
    ) -> None:
        self._names, self.labels = names, labels
        self.shards = np.repeat(np.arange(len(lengths)), lengths)
        self._first = np.cumsum([0, *lengths])
        self.has_numbers_alone = not classes
        classes = classes or [str(number) for number in range(largest + 1)]
        if largest >= len(classes):
            own = f"the {len(classes)} classes of the index, or of the files' own schema"
            raise InputError(f"{names[0]} …: the label {largest} is beyond {own}")
        self.class_to_idx: Mapping[str, int] = {name: number for number, name in enumerate(classes)}
        self._opened: OrderedDict[int, Any] = OrderedDict()  # by shard what `_open` gave, or why that cannot be

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[BinaryIO, Any]:
        shard, place = self._place_of(number)
        with READING:
            content = self._read(self._opened_one(shard), shard, place)
        return io.BytesIO(content), self.labels[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": OrderedDict()}  # another process opens its own

    def name_of(self, number: int) -> str:
        """What a message calls an image."""
        shard, place = self._place_of(number)
        return f"{self._names[shard]}: image {place}"

    def _place_of(self, number: int) -> tuple[int, int]:
        shard = int(self.shards[number])
        return shard, number - int(self._first[shard])

    def _opened_one(self, shard: int) -> Any:
        """A shard: one of each stream is open at a time."""
        if shard not in self._opened:
            try:
                self._opened[shard] = self._open(shard)
            except Exception as error:  # the system's, pyarrow's, or of as many packages as there are protocols
                self._opened[shard] = getattr(error, "strerror", None) or first_line(error)
            while len(self._opened) > STREAMS:
                _, oldest = self._opened.popitem(last=False)
                if hasattr(oldest, "close"):
                    oldest.close()
        self._opened.move_to_end(shard)
        if isinstance(self._opened[shard], str):
            raise UnreadableImage(self._names[shard], self._opened[shard])
        return self._opened[shard]

    def _open(self, shard: int) -> Any:
        """A shard from which `_read` reads."""
        raise NotImplementedError

    def _read(self, opened: Any, shard: int, place: int) -> bytes:
        """The content of an image, by its place in an opened shard."""
        raise NotImplementedError


class Shards(ImagesInShards):
    """Images in tar files; labels are tuples where one of them has other than one.

    Attributes:
        damaged: shards that end early, or cannot be had, and why.
    """

    def __init__(self, places: Sequence[str], index: Index, copies: Copies) -> None:
        self._copies, known = copies, [index.shards[place] for place in places]
        self.damaged = [(place, shard.problem) for place, shard in index.shards.items() if shard.problem]
        self._sizes, self._images = [shard.size for shard in known], [shard.images for shard in known]
        counts, flat = (np.concatenate([getattr(shard, name) for shard in known]) for name in ("counts", "labels"))
        labels: Sequence[Any] = flat
        if (counts != 1).any():
            labels = [tuple(part.tolist()) for part in np.split(flat, counts.cumsum()[:-1])]
        super().__init__([*places], [*map(len, self._images)], labels, flat.max(initial=-1), index.classes)

    def _open(self, shard: int) -> BinaryIO:
        file = open(self._copies.get(self._names[shard]), "rb")  # noqa: SIM115  (closed when others are opened)
        size = os.fstat(file.fileno()).st_size
        if size != self._sizes[shard]:
            file.close()
            raise OSError(f"has {size} bytes, its index says {self._sizes[shard]}: it was cut short, or changed since")
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)  # all of it will be read, in any order
        return file

    def _read(self, opened: BinaryIO, shard: int, place: int) -> bytes:
        start, size = self._images[shard][place].tolist()
        return os.pread(opened.fileno(), size, start)


class Shard(NamedTuple):
    """What is known of a shard.

    Attributes:
        size: bytes of the file.
        images: first byte and number of bytes of each image, (n, 2) int64.
        counts: labels of each image, (n,).
        labels: of all images one after the other.
        problem: why it ends before it should; empty if it does not.
    """

    size: int
    images: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    problem: str = ""


@dataclass
class Index:
    """Shards by their names, and the names of the classes if they are known."""

    shards: dict[str, Shard]
    classes: Sequence[str] = ()

    def save(self, file: Path) -> None:
        """Write it as arrays of numpy's."""
        names, shards = [*self.shards], [*self.shards.values()]
        arrays = {
            "names": np.array(names),
            "sizes": np.array([shard.size for shard in shards]),
            "problems": np.array([shard.problem for shard in shards]),
            "lengths": np.array([len(shard.images) for shard in shards]),
            "images": np.concatenate([shard.images for shard in shards]),
            "counts": np.concatenate([shard.counts for shard in shards]),
            "labels": np.concatenate([shard.labels for shard in shards]),
            "classes": np.array(self.classes, dtype=str),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.new_content(file) as opened:
            np.savez(opened, **arrays)

    @classmethod
    def load(cls, file: Path) -> Index:
        """Read it; InputError if it is none."""
        with input_errors(f"{file}: is no index of shards", Exception):  # numpy's, zip's, of missing arrays
            with np.load(file, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            ends = arrays["lengths"].cumsum()
            images, counts = (np.split(arrays[name], ends[:-1]) for name in ("images", "counts"))
            labels = np.split(arrays["labels"], np.cumsum([part.sum() for part in counts])[:-1])
            parts = zip(arrays["sizes"].tolist(), images, counts, labels, arrays["problems"].tolist(), strict=True)
            shards = dict(zip(arrays["names"].tolist(), (Shard(*part) for part in parts), strict=True))
        return cls(shards, arrays["classes"].tolist())


def scan(file: Path, name: str, needs_labels: bool = True) -> Shard:
    """Look through a shard; what is whole before a tar file ends too early counts.

    Raises:
        InputError: a sample without a label where they are needed, or one that is no number.
    """
    images: list[tuple[int, int]] = []
    labels: list[list[int]] = []
    problem, size = "", os.path.getsize(file)
    try:
        with tarfile.open(file, "r:") as tar:
            for sample, members in groupby(filterfalse(_is_hidden, tar), _sample_of):
                image, numbers = None, None
                for member in members:
                    base = os.path.basename(member.name)
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{sample} is cut off")
                    if base.partition(".")[2] == LABEL:
                        numbers = _numbers(tar.extractfile(member), f"{name}: {member.name}")
                    elif image is None and is_image(base):
                        image = member.offset_data, member.size
                if image is not None:
                    if needs_labels and numbers is None:
                        raise InputError(f"{name}: sample {sample} has no label, a member {sample}.{LABEL}")
                    images.append(image)
                    labels.append(numbers or [])
    except tarfile.ReadError as error:
        problem = f"the tar file ends early or is damaged after {len(images)} samples: {first_line(error)}"
    return Shard(
        size,
        np.array(images, dtype=np.int64).reshape(-1, 2),
        np.array([len(own) for own in labels], dtype=np.int64),
        np.array([label for own in labels for label in own], dtype=np.int64),
        problem,
    )


def _is_hidden(member: tarfile.TarInfo) -> bool:
    """As macOS adds one to each file."""
    return os.path.basename(member.name).startswith(".")


def _sample_of(member: tarfile.TarInfo) -> str:
    """A member's name up to the first point after its folder."""
    folder, base = os.path.split(member.name)
    return os.path.join(folder, base.partition(".")[0])


def _numbers(member: BinaryIO | None, place: str) -> list[int]:
    text = "" if member is None else member.read().decode(errors="replace")
    try:
        numbers = [int(word) for word in text.split()]
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise InputError(f"{place}: {text[:40]!r} is no label: allowed are numbers of classes from 0 on")
    return numbers


def open_shards(data: DataConfig, split: str) -> Shards:
    """The images of a split; InputError: no shards, or labels beyond the classes."""
    return shards_at(split_places(data, split, ".tar"), data.patience)


def shards_at(places: Sequence[str], patience: float, needs_labels: bool = True) -> Shards:
    """The images of some shards; InputError: labels beyond the classes, or none where they are needed."""
    copies = Copies.of(places, 2 * STREAMS, patience)
    return Shards(places, index_of(places, copies, needs_labels), copies)


def index_of(places: Sequence[str], copies: Copies, needs_labels: bool) -> Index:
    """The indices beside the shards, else the one that an earlier run has kept, else a new one, which is kept.

    Raises:
        InputError: shards of several folders have different classes.
    """
    split = {place: (PIPE, place) if place.startswith(PIPE) else os.path.split(place) for place in places}
    beside = {folder: _beside(folder, copies) for folder in dict.fromkeys(folder for folder, _ in split.values())}
    if all((index := beside[folder]) is not None and name in index.shards for folder, name in split.values()):
        first, *others = beside
        classes = beside[first].classes
        for folder in others:
            if beside[folder].classes != classes:
                raise InputError(f"{folder}/{INDEX}: has other classes than {first}/{INDEX}")
        return Index({place: beside[folder].shards[name] for place, (folder, name) in split.items()}, classes)
    state = [RULES, needs_labels, *((place, None if is_remote(place) else _state(place)) for place in places)]
    kept = cache_folder() / "indices" / f"{hashlib.sha256(to_json(state).encode()).hexdigest()[:24]}.npz"
    if kept.exists():  # needs no lock, which a cache that others may only read would not allow
        return Index.load(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with alone(kept):
        return Index.load(kept) if kept.exists() else _scanned(places, copies, needs_labels, kept)


def _scanned(places: Sequence[str], copies: Copies, needs_labels: bool, kept: Path) -> Index:
    """A new index of the shards, which is kept if none of them is missing for now."""
    found: dict[str, Shard] = {}
    for place in tqdm(places, desc="counting the samples of shards", unit="shard", disable=None, leave=False):
        try:
            found[place] = scan(copies.get(place), place, needs_labels)
        except OSError as error:
            nothing = np.zeros(0, np.int64)
            found[place] = Shard(0, nothing.reshape(0, 2), nothing, nothing, error.strerror or str(error))
    index = Index(found)
    if not any(shard.problem and is_remote(place) for place, shard in found.items()):  # which may be there another time
        index.save(kept)
    return index


def _beside(folder: str, copies: Copies) -> Index | None:
    """The index in a folder. One from elsewhere is fetched anew; copies of shards from before another one go."""
    if folder == PIPE:
        return None
    if not is_remote(folder):
        file = Path(folder, INDEX)
        return Index.load(file) if file.exists() else None
    copies.folder.mkdir(parents=True, exist_ok=True)
    place = f"{folder}/{INDEX}"
    file = copies.path_of(place).with_suffix(".npz")
    new = file.with_name(f"new-{file.name}")
    with alone(file):
        try:
            fetch(place, new, copies.patience, attempts=1)
        except OSError:  # there is none, or it cannot be had today
            return Index.load(file) if file.exists() else None
        if file.exists() and file.read_bytes() != new.read_bytes():
            copies.clear()
        os.replace(new, file)
        return Index.load(file)


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def open_parquet(data: DataConfig, split: str) -> ParquetImages:
    """The images of a split; InputError: no files, or without the columns that are needed."""
    columns = {"image": "image", "label": "label", **data.columns}
    places = split_places(data, split, ".parquet", folders=("", "data/"))
    return ParquetImages(places, columns["image"], columns["label"])


class ParquetImages(ImagesInShards):
    """Images in the rows of Parquet files; labels are tuples where a row lists several.

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
        names: Sequence[str] = ()
        for place in places:
            # pyarrow's, or of as many packages as there are protocols
            with input_errors(f"{place}: cannot be read as Parquet", Exception):
                file = _parquet_file(place)
                schema, metadata = file.schema_arrow, file.metadata
                missing = [name for name in (image, label) if name not in schema.names]
                if missing:
                    known = ", ".join(schema.names)
                    raise InputError(f"{place}: has no column {missing[0]} (data.columns), but {known}")
                values += file.read([label]).column(label).to_pylist()
            self._groups += [(place, number) for number in range(metadata.num_row_groups)]
            lengths += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            names = names or _class_names(schema.metadata or {}, label)
        labels, largest, classes = _numbered(values, names, f"{places[0]}: {label}")
        groups = [f"{place}, row group {number}" for place, number in self._groups]
        super().__init__(groups, lengths, labels, largest, classes)

    def _open(self, shard: int) -> Any:
        place, number = self._groups[shard]
        return _parquet_file(place).read_row_group(number, [self._image]).column(self._image)

    def _read(self, opened: Any, shard: int, place: int) -> bytes:
        value = opened[place].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"the column {self._image} holds no bytes")
        return content


def _parquet_file(place: str) -> Any:
    if not is_remote(place):
        return parquet().ParquetFile(place)
    import fsspec

    return parquet().ParquetFile(fsspec.open(place).open())


def _class_names(metadata: Mapping[bytes, bytes], label: str) -> Sequence[str]:
    """Those that the hub's libraries have written of a column with numbers."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(label, {})
    return feature.get("names") or feature.get("feature", {}).get("names") or ()


def _numbered(values: Sequence[Any], names: Sequence[str], place: str) -> tuple[Sequence[Any], int, Sequence[str]]:
    """Labels as numbers or tuples of them, the largest of them, and the classes' names if they have some."""
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
    labels: Sequence[Any] = [tuple(row) for row in rows] if has_several else np.array([row[0] for row in rows])
    return labels, largest, names
