"""The data of a configuration: image folders and every other data set that timm can open, or two that need no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import create_dataset

from engine.config import Config, DataConfig
from engine.data.files import Images, image_folder
from engine.data.source import DataSource, build_digits, build_synthetic
from engine.data.transforms import build_eval_transform, build_train_transform
from engine.errors import InputError, first_line
from engine.text import readable_name

# The names under which the folder of a split is looked for: timm's, and test
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))
KINDS = ("torch", "hfds")  # timm's others, hfids, tfds and wds, are streams, in which no image has a number


def build_source(config: Config, with_training: bool = True) -> DataSource:
    """The data set that `data.dataset` names; without its training images, these need not be there.

    Raises:
        InputError: no root, no folder for a split, a class without images, splits with different classes, one class
            only, or a data set that timm cannot open.
    """
    data = config.data
    if data.dataset == "digits":
        return build_digits(data.image_size)
    if data.dataset == "synthetic":
        return build_synthetic(data.image_size, data.synthetic_samples)
    train, items = _open(data, data.train_split) if with_training else None, _open(data, data.eval_split)
    classes = items.class_to_idx
    if train is not None and (differing := train.class_to_idx.items() ^ classes.items()):
        names = sorted({str(name) for name, _ in differing})
        raise InputError(f"data.root = {data.root}: the splits have different classes: {', '.join(names[:5])}")
    names = {number: readable_name(str(name)) for name, number in classes.items()}
    if len(names) < 2:
        raise InputError(
            f"data.root = {data.root}: the only class is {next(iter(names.values()))}, at least two are needed"
        )
    num_classes = max(names) + 1
    transform, held_out_transform = (
        build(config.transform, data.image_size) for build in (build_train_transform, build_eval_transform)
    )
    return DataSource(
        train=None if train is None else Images(train, transform, "training"),
        held_out=Images(items, held_out_transform, "held-out"),
        num_classes=num_classes,
        in_chans=3,
        class_names=[names.get(number, str(number)) for number in range(num_classes)],
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
