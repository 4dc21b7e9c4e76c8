"""What prepare_data.py does: splits of images with labels, their shards and the index of these, smaller images."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from engine import atomic
from engine.config import DataConfig
from engine.data.files import ImageFiles, image_folder, split_folder
from engine.data.images import decode, several
from engine.data.shards import INDEX, LABEL, Index, Shard, scan
from engine.data.source import open_table
from engine.errors import InputError, first_line, writing_errors
from engine.text import to_json

SPLITS = ("train", "val")
INFO = "_info.json"  # under this name timm looks for the lengths of shards


Resizing = Callable[[Path], bytes]  # `resized` to some side and quality


def resized(file: Path, side: int, quality: int, max_megapixels: float) -> bytes:
    """The image in a file, its shorter side at most `side` pixels, as a JPEG; InputError if there is none.

    The orientation that a camera noted is noted there too: whoever reads it decides about it, as of the original.
    """
    try:
        with file.open("rb") as opened:
            image = decode(opened, DataConfig(max_megapixels=max_megapixels))
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)
    content, noted = io.BytesIO(), Image.Exif()
    noted[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.save(content, "JPEG", quality=quality, exif=noted)
    return content.getvalue()


def open_splits(source: Path, data: DataConfig) -> tuple[list[str], dict[str, ImageFiles], list[str]]:
    """Names of the classes, the images of each split that there is, and what else there is, in words.

    Raises:
        InputError: neither a folder of splits nor a table, or none of the splits.
    """
    splits: dict[str, ImageFiles] = {}
    others: list[str] = []
    if source.is_dir():
        folders = {split: split_folder(source, split) for split in SPLITS}
        splits = {split: image_folder(folder) for split, folder in folders.items() if folder is not None}
        there = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
        others = [f"{folder.name}/" for folder in there if folder not in folders.values()]
    elif source.is_file():
        table = open_table(data)
        names = {split: table.name_of_split(split) for split in SPLITS}
        splits = {split: table.files_of(split) for split, name in names.items() if name is not None}
        rows = Counter(name for name in table.splits if name not in names.values())
        others = [f"{number} rows of the split {name}" for name, number in rows.items()]
    if not splits:
        raise InputError(f"{source}: neither a folder with train/<class> or val/<class>, nor a table with a split")
    classes = {split: [*files.class_to_idx] for split, files in splits.items()}
    if len({*map(tuple, classes.values())}) > 1:
        raise InputError(f"{source}: the splits have different classes")
    return next(iter(classes.values())), splits, others


def write_shards(
    splits: Mapping[str, ImageFiles],
    classes: Sequence[str],
    target: Path,
    samples: int,
    resizing: Resizing | None,
    jobs: int,
) -> list[str]:
    """Write shards of all splits, an index of where their images lie, and their lengths as timm reads them.

    Returns:
        A line for each split.

    Raises:
        InputError: an image that is to be resized cannot be read.
        RunError: something cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    work: list[tuple[Path, int, list[tuple[str, Any]]]] = []  # file, number of its first sample, samples
    for split, files in splits.items():
        order = np.random.default_rng(0).permutation(len(files))
        for number, first in enumerate(range(0, len(order), samples)):
            own = [files.samples[place] for place in order[first : first + samples]]
            work.append((target / f"{split}-{number:05d}.tar", first, own))
    with writing_errors(target):
        shards = _in_parallel(partial(_write_shard, resizing), work, jobs, "shard")
        index = Index({path.name: shard for (path, *_), shard in zip(work, shards, strict=True)}, classes)
        lengths: dict[str, dict[str, int]] = {split: {} for split in splits}
        for name, shard in index.shards.items():
            lengths[name.rpartition("-")[0]][name] = len(shard.images)
        about = [
            {"name": split, "num_samples": sum(own.values()), "filenames": [*own], "shard_lengths": [*own.values()]}
            for split, own in lengths.items()
        ]
        atomic.write_text(target / INFO, to_json({"splits": {split["name"]: split for split in about}}, indent=2))
        index.save(target / INDEX)
    return [f"{split['name']}: {split['num_samples']} images in {len(split['filenames'])} shards" for split in about]


def _write_shard(resizing: Resizing | None, arguments: tuple[Path, int, Sequence[tuple[str, Any]]]) -> Shard:
    path, first, samples = arguments
    with atomic.new_content(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, (image, label) in enumerate(samples, start=first):
            content = Path(image).read_bytes() if resizing is None else resizing(Path(image))
            suffix = os.path.splitext(image)[1].lower() if resizing is None else ".jpg"
            numbers = " ".join(map(str, several(label)))
            for name, member in ((f"{key:08d}{suffix}", content), (f"{key:08d}.{LABEL}", numbers.encode())):
                about = tarfile.TarInfo(name)  # without time and owner: the same images are the same shard
                about.size = len(member)
                tar.addfile(about, io.BytesIO(member))
    return scan(path, str(path))


def write_folder(
    splits: Mapping[str, ImageFiles], classes: Sequence[str], target: Path, resizing: Resizing, jobs: int
) -> list[str]:
    """Write resized images as <split>/<class>/<name>.jpg, two of one name with the number of their place.

    Returns:
        A line for each split.

    Raises:
        InputError: an image cannot be read, or has other than one label.
        RunError: something cannot be written.
    """
    work: dict[Path, str] = {}
    for split, files in splits.items():
        for number, (path, label) in enumerate(files.samples):
            if len(several(label)) != 1:
                raise InputError(f"{path}: has {len(several(label))} labels: class folders need one, use shards")
            name, stem = classes[several(label)[0]], Path(path).stem
            if name.startswith(".") or os.sep in name:
                raise InputError(f"{path}: its class {name!r} is no name of a folder: use shards, or rename the class")
            names = chain([stem], (f"{stem}-{place}" for place in count(number)))
            folder = target / split / name
            work[next(copy for one in names if (copy := folder / f"{one}.jpg") not in work)] = path
    with writing_errors(target):
        for folder in {path.parent for path in work}:
            folder.mkdir(parents=True, exist_ok=True)
        for _ in _in_parallel(partial(_write_image, resizing), [*work.items()], jobs, "image"):
            pass
    return [f"{split}: {len(files)} images" for split, files in splits.items()]


def _write_image(resizing: Resizing, arguments: tuple[Path, str]) -> None:
    path, source = arguments
    path.write_bytes(resizing(Path(source)))


def _in_parallel(work: Callable[[Any], Any], arguments: Sequence[Any], jobs: int, unit: str) -> Iterator[Any]:
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(work, arguments, chunksize=max(1, min(64, len(arguments) // (4 * jobs))))
        yield from tqdm(found, total=len(arguments), unit=unit, disable=None)
