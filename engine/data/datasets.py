"""The images of a configuration: a folder's files in their order, or any other data set that timm can open."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset

from augsub.named_registry import did_you_mean
from engine.config import PHOTOGRAPHS, UNTRANSFORMED, Config, DataConfig, has_several_labels, image_channels
from engine.data.files import ImageFiles, Table, image_folder, image_table, split_folder, split_names
from engine.data.images import Images, UnreadableImage, labels_of
from engine.data.parquet import open_parquet
from engine.data.shards import open_shards
from engine.data.source import DataSource, build_digits, build_synthetic
from engine.data.transforms import build_transform
from engine.errors import InputError, first_line
from engine.text import readable_name

KINDS = ("torch", "hfds")  # timm's others are streams, in which no image has a number
ONE_LABEL_ONLY = ("classes", "images_per_class", "sampling")  # keys of data that need one label of each image


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
    open_split = _opener(data)
    train = open_split(data.train_split) if with_training or data.validation_share else None
    held_out = train if data.validation_share else open_split(data.eval_split)
    has_several = has_several_labels(config)
    for items in filter(None, (train, held_out)):
        _check_labels(data, items, has_several)
    classes = _classes(data, train, held_out)
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
            items,
            build_transform(config, is_training),
            split,
            chosen[split],
            labels,
            num_classes if has_several else None,
            data,
        )
        for split, items, is_training in (("training", train, True), ("held-out", held_out, False))
        if items is not None and (with_training or not is_training)
    }
    if image_channels(data) not in PHOTOGRAPHS:
        _check_channels(sets["held-out"])
    return DataSource(
        train=sets.get("training"),
        held_out=sets["held-out"],
        num_classes=num_classes,
        in_chans=image_channels(data),
        class_names=[class_names.get(number, str(number)) for number in range(num_classes)],
        has_several_labels=has_several,
    )


def _check_channels(images: Images) -> None:
    """Refuse images of other channels, by the first one."""
    try:
        images[0]
    except UnreadableImage as error:
        name, reason = error.args
        raise InputError(f"{name}: {reason}") from error


def _check_labels(data: DataConfig, items: Any, has_several: bool) -> None:
    """Refuse images without exactly one label where each needs one."""
    for key in ONE_LABEL_ONLY if has_several else ():
        if getattr(data, key):
            raise InputError(f"data.{key} = {getattr(data, key)}: not where images may have several labels")
    labels = labels_of(items)
    if has_several or not any(isinstance(label, tuple) for label in labels):
        return
    wrong = [number for number, label in enumerate(labels) if len(label) != 1]
    if wrong:
        number = wrong[0]
        raise InputError(
            f"{items.name_of(number)}: has {len(labels[number])} labels, as have other than one {len(wrong)} of "
            f"{len(labels)} images: several labels need loss.name=bce and evaluation.metric=map (or f1_macro, f1_micro)"
        )


def _classes(data: DataConfig, train: Any, held_out: Any) -> Mapping[Any, int]:
    """Numbers by the classes' names, which the splits must share; where they have but numbers, up to the largest."""
    splits = [items for items in (train, held_out) if items is not None]
    if all(getattr(items, "has_numbers_alone", False) for items in splits):
        return max((items.class_to_idx for items in splits), key=len)
    if differing := splits[0].class_to_idx.items() ^ splits[-1].class_to_idx.items():
        names = sorted({str(name) for name, _ in differing})
        raise InputError(f"data.root = {data.root}: the splits have different classes: {', '.join(names[:5])}")
    return splits[0].class_to_idx


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
        labels, parts = _groups(train), []
        if len(labels) != len(train):
            raise InputError(
                "data.classes, data.validation_share, data.images_per_class: need a data set that lists its labels, "
                f"{data.dataset} does not"
            )
        for label in kept if len(np.unique(labels)) > 1 else (0,):
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
        chosen["held-out"] = np.flatnonzero(np.isin(_groups(held_out), kept)).tolist() if data.classes else None
    return chosen


def _groups(items: Any) -> np.ndarray:
    """The class of each image (N,); all are in the group 0 where images have several."""
    labels = labels_of(items)
    return np.zeros(len(labels), np.int64) if any(isinstance(label, tuple) for label in labels) else np.asarray(labels)


def _opener(data: DataConfig) -> Callable[[str], Any]:
    """What opens a split: pairs (open file or image, label) by number, with their `class_to_idx`."""
    if data.dataset == "folder":
        return lambda split: _open_folder(root_of(data), split)
    if data.dataset == "table":
        table = open_table(data)
        is_whole = data.validation_share and not any(table.splits)
        return lambda split: table.files_of(None if is_whole else split)
    if data.dataset == "wds":
        return lambda split: open_shards(data, split)
    if data.dataset == "parquet":
        return lambda split: open_parquet(data, split)
    kind, _, name = data.dataset.partition("/")
    if kind == "hfids":
        raise InputError(
            f"data.dataset = {data.dataset}: streams of the hub are read with data.dataset=parquet "
            f"data.train_split=hf://datasets/{name}/data/train-*.parquet, and data.eval_split likewise"
        )
    if kind.lower() not in KINDS:
        known = ", ".join(["folder, table, wds, parquet", *UNTRANSFORMED, *(f"timm's {kind}/NAME" for kind in KINDS)])
        raise InputError(f"data.dataset = {data.dataset}: allowed is {known}")
    return lambda split: _open_timms(data, split)


def _open_folder(root: Path, split: str) -> ImageFiles:
    folder = split_folder(root, split)
    if folder is None:
        raise InputError(
            f"data.root = {root}: no folder for the split {split} (any of {', '.join(split_names(split))})"
        )
    return image_folder(folder)


def open_table(data: DataConfig) -> Table:
    """`data.table`, checked as a whole."""
    if data.table is None:
        raise InputError("data.table is not set: it names the CSV or Parquet file with a row for each image")
    file, columns = Path(data.table), {"path": "path", "labels": "labels", "split": "split", **data.columns}
    root = file.parent if data.root is None else root_of(data)
    labels = columns["labels"] if isinstance(columns["labels"], str) else tuple(columns["labels"])
    return image_table(file, root, columns["path"], labels, columns["split"], data.label_separator)


def _open_timms(data: DataConfig, split: str) -> Any:
    try:
        dataset = create_dataset(data.dataset, root=data.root, split=split)
    except Exception as error:  # of other packages, or that they are not installed
        place = f"data.dataset = {data.dataset}, root = {data.root}, split {split}"
        raise InputError(f"{place}: {first_line(error)}") from error
    items = getattr(dataset, "reader", dataset)
    if not getattr(items, "class_to_idx", None):
        raise InputError(f"data.dataset = {data.dataset}: does not tell its classes")
    return items


def root_of(data: DataConfig) -> Path:
    """`data.root`, which must be a folder."""
    if data.root is None:
        raise InputError("data.root is not set: it names the folder with the training and the held-out images")
    if not Path(data.root).is_dir():
        raise InputError(f"data.root = {data.root}: no such folder")
    return Path(data.root)
