"""The data of a run: a pair of data sets, opened as a configuration says, and what a model must know of them.

What a checkpoint says of its data is `DataSource.facts`. Whether they are those that weights come from is checked at
the end of this file; `data.allow_mismatch` turns a refusal into a warning.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from augsub.named_registry import did_you_mean
from engine.config import PHOTOGRAPHS, UNTRANSFORMED, Config, DataConfig, has_several_labels, image_channels, sides
from engine.data.files import ImageFiles, image_folder, image_table, split_folder, split_names
from engine.data.images import IGNORED, Images, UnreadableImage, labels_of, several
from engine.data.shards import open_parquet, open_shards
from engine.data.transforms import build_transform
from engine.errors import InputError, input_errors
from engine.seeding import derive_seed
from engine.text import readable_name

LOGGER = logging.getLogger("engine")
KINDS = ("torch", "hfds")  # timm's others are streams, in which no image has a number
ONE_LABEL_ONLY = ("classes", "images_per_class", "sampling")  # keys of data that need one label of each image
TRAIN_DIGITS = 1000  # the other 797 are held out
SYNTHETIC_CLASSES = 10


@dataclass
class DataSource:
    """Data sets of (image (C, H, W), label), which may raise UnreadableImage, and the shape of the task.

    Attributes:
        train: None where the source is for evaluation alone.
        num_classes: outputs of the model.
        class_names: by label; their numbers if none are given.
        candidates: numbers of the model's classes among which it chooses, in the order of the labels; None: all.
        has_several_labels: whether an image may have several labels, or none: targets are (K,) of 0 and 1.
        accepted: (N, M) all right classes of N images, filled up with IGNORED, of which labels are rows; None: labels
            are the classes.
    """

    train: Dataset | None
    held_out: Dataset
    num_classes: int
    in_chans: int
    class_names: Sequence[str] = ()
    candidates: Sequence[int] | None = None
    accepted: Tensor | None = None
    has_several_labels: bool = False

    def __post_init__(self) -> None:
        self.class_names = tuple(self.class_names or map(str, range(self.num_classes)))

    def image_shape(self, image_size: int | Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) of what `data.image_size` says."""
        return self.in_chans, *sides(image_size)

    @property
    def left_out(self) -> dict[str, str]:
        """Files in the folders of each split that are no images: `training` to "12 .txt, 3 hidden"."""
        return {
            name: ", ".join(f"{count} {suffix}" for suffix, count in found.most_common())
            for name, dataset in self._splits.items()
            if (found := getattr(dataset, "left_out", None))
        }

    @property
    def no_target(self) -> Tensor | int:
        """The target of what is no image, IGNORED throughout."""
        return torch.full((self.num_classes,), float(IGNORED)) if self.has_several_labels else IGNORED

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Shards that cannot be read to their end, and why."""
        return [found for dataset in self._splits.values() for found in getattr(dataset, "damaged", ())]

    @property
    def train_shards(self) -> Tensor | None:
        """In which shard each training image lies, (N,); None if they can be read in any order."""
        shards = getattr(self.train, "shards", None)
        return None if shards is None else torch.from_numpy(shards)

    @cached_property
    def train_labels(self) -> np.ndarray:
        """The labels (N,) of the training images, or their targets (N, K); InputError if the data set lists none."""
        dataset = self.train
        labels = dataset.tensors[1].numpy() if isinstance(dataset, TensorDataset) else dataset.labels
        if len(labels) != len(dataset):
            raise InputError("loss.class_weights, data.sampling: need a data set that lists its labels")
        return labels

    @property
    def _splits(self) -> dict[str, Dataset]:
        splits = {"training": self.train, "held-out": self.held_out}
        return {name: dataset for name, dataset in splits.items() if dataset is not None}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of the data of its run."""
        return {
            "data": {"num_classes": self.num_classes, "in_chans": self.in_chans},
            "class_names": list(self.class_names),
            "fingerprints": {name: fingerprint(dataset) for name, dataset in self._splits.items()},
        }


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """The number of `images`, and a `sha256` over what the data set lists of them.

    Of a folder these are the paths from its root on and the labels, in their order; of a data set of torchvision or
    Hugging Face the labels; of others nothing, so that their number alone counts. Pixels are not part of it, nor is the
    place where the data lie.
    """
    digest = hashlib.sha256()
    for line in getattr(dataset, "listing", tuple)():
        digest.update(line.encode(errors="surrogateescape") + b"\0")  # which no path contains
    return {"images": len(dataset), "sha256": digest.hexdigest()}


# In place of data that is not there, to count and to plan with: it has the size of ImageNet-1k, and no image
IMAGENET = DataSource(train=range(1_281_167), held_out=range(50_000), num_classes=1000, in_chans=3)


def build_source(config: Config, with_training: bool = True, known_classes: int = 0) -> DataSource:
    """The data set that `data.dataset` names; without its training images, these need not be there.

    Args:
        known_classes: at least so many classes, which weights know, where they have but numbers.
    """
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
    if not data.classes and getattr(held_out, "has_numbers_alone", False):
        num_classes = max(num_classes, known_classes)
    chosen = _chosen(data, train, held_out, [*labels], has_several)
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
        here, there = (items.class_to_idx.keys() for items in (splits[0], splits[-1]))
        lacking = [
            f"{', '.join(map(str, sorted(names, key=str)[:5]))} {where}"
            for names, where in ((here - there, "in training alone"), (there - here, "held out alone"))
            if names
        ]
        names = "; ".join(lacking) or ", ".join(sorted({str(name) for name, _ in differing})[:5])
        raise InputError(f"data.root = {data.root}: the splits have different classes: {names}")
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


def _chosen(
    data: DataConfig, train: Any, held_out: Any, kept: Sequence[int], has_several: bool
) -> dict[str, list[int] | None]:
    """Numbers of the training and the held-out images, in their order; None: all.

    Args:
        kept: labels, as the data set has them.
        has_several: whether images may have several labels; they are not chosen by class then.
    """
    chosen: dict[str, list[int] | None] = {"training": None, "held-out": None}
    if train is not None and (data.classes or data.validation_share or data.images_per_class):
        labels, parts = _groups(train, has_several), []
        if len(labels) != len(train):
            raise InputError(
                "data.classes, data.validation_share, data.images_per_class: need a data set that lists its labels, "
                f"{data.dataset} does not"
            )
        for label in (0,) if has_several else kept:
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
        chosen["held-out"] = (
            np.flatnonzero(np.isin(_groups(held_out, has_several), kept)).tolist() if data.classes else None
        )
    for split, numbers in chosen.items():
        if numbers is not None and not numbers:
            raise InputError(f"data.classes = {data.classes}: no {split} image has one of them")
    return chosen


def _groups(items: Any, has_several: bool) -> np.ndarray:
    """The class of each image (N,); all are in the group 0 where images may have several."""
    labels = labels_of(items)
    return np.array([0 if has_several else int(*several(label)) for label in labels], np.int64)


def _opener(data: DataConfig) -> Callable[[str], Any]:
    """What opens a split: pairs (open file or image, label) by number, with their `class_to_idx`."""
    if data.dataset == "folder":
        return lambda split: _open_folder(root_of(data), split)
    if data.dataset == "table":
        table = open_table(data)
        is_whole = data.validation_share and not any(table.splits)
        return lambda split: table if is_whole else table.files_of(split)
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


def open_table(data: DataConfig) -> ImageFiles:
    """`data.table`, checked as a whole."""
    if data.table is None:
        raise InputError("data.table is not set: it names the CSV or Parquet file with a row for each image")
    file, columns = Path(data.table), {"path": "path", "labels": "labels", "split": "split", **data.columns}
    root = file.parent if data.root is None else root_of(data)
    labels = columns["labels"] if isinstance(columns["labels"], str) else tuple(columns["labels"])
    return image_table(
        file, root, columns["path"], labels, columns["split"], "split" in data.columns, data.label_separator
    )


def _open_timms(data: DataConfig, split: str) -> Any:
    place = f"data.dataset = {data.dataset}, root = {data.root}, split {split}"
    with input_errors(place, Exception):  # of other packages, or that they are not installed
        dataset = create_dataset(data.dataset, root=data.root, split=split)
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


def build_digits(image_size: int | Sequence[int]) -> DataSource:
    """scikit-learn's bundled handwritten digits: 1797 real images of 8 x 8 pixels in 10 classes, no download.

    The split is fixed; images (1, S, S) are standardised with the training images' mean and deviation.
    """
    from sklearn.datasets import load_digits  # here: other data need not wait for scikit-learn

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # counts from 0 to 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    images = (images - images[train].mean()) / images[train].std()
    if sides(image_size) != images.shape[-2:]:
        images = F.interpolate(images, size=sides(image_size), mode="bilinear", align_corners=False)
    return DataSource(
        train=TensorDataset(images[train], labels[train]),
        held_out=TensorDataset(images[held_out], labels[held_out]),
        num_classes=10,
        in_chans=1,
    )


class SyntheticImages(Dataset):
    """Noise around a brightness that depends on the label; each image is made when it is asked for."""

    def __init__(self, split: int, samples: int, image_size: int | Sequence[int]) -> None:
        self._split = split
        self._samples = samples
        self._sides = sides(image_size)

    def __len__(self) -> int:
        return self._samples

    @property
    def labels(self) -> np.ndarray:
        """Of all images, (N,)."""
        return np.arange(self._samples) % SYNTHETIC_CLASSES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % SYNTHETIC_CLASSES
        generator = torch.Generator().manual_seed(derive_seed(self._split, index))
        noise = torch.randn(3, *self._sides, generator=generator)
        return noise + (label - (SYNTHETIC_CLASSES - 1) / 2) / SYNTHETIC_CLASSES, label


def build_synthetic(image_size: int | Sequence[int], samples: int) -> DataSource:
    """Random images with learnable labels, for trying a configuration or a machine; the splits differ."""
    return DataSource(
        train=SyntheticImages(0, samples, image_size),
        held_out=SyntheticImages(1, samples, image_size),
        num_classes=SYNTHETIC_CLASSES,
        in_chans=3,
    )


def check_classes(config: Config, class_names: Sequence[str], known: Any, weights: str) -> None:
    """Compare the classes of the data with those that the outputs of a model stand for.

    Args:
        class_names: of the data, by number.
        known: those of the weights, by number; anything but a list says nothing.
        weights: whose they are, for the message.

    Raises:
        InputError: others, or the same ones in another order.
    """
    if not known or not isinstance(known, list | tuple):
        return
    pairs = enumerate(zip_longest(known, class_names))
    different = [(number, theirs, own) for number, (theirs, own) in pairs if theirs != own]
    if different:
        number, theirs, own = different[0]
        difference = (
            f"{weights} is for other classes than the data have, or numbers them in another order: {len(different)} "
            f"differ, number {number} is {theirs}, in the data {own}"
        )
        if None in different[-1]:  # the model's outputs do not fit, whatever is meant
            raise InputError(difference)
        _refuse(config, difference)


def check_pretrained_classes(config: Config, class_names: Sequence[str], model: Any, weights: str) -> None:
    """Compare the classes of the data with those of timm's pretrained head, if it tells them and there are as many.

    Args:
        class_names: of the data, by number.
        model: of timm.
        weights: what they are, for the message.

    Raises:
        InputError: they differ.
    """
    own = getattr(model, "pretrained_cfg", {})
    if own.get("num_classes") == len(class_names):
        check_classes(config, class_names, own.get("label_names"), weights)


def check_resumed(config: Config, source: DataSource, facts: dict[str, Any], checkpoint: Path) -> None:
    """Compare the data with those of the run that goes on: another image changes epochs, order and schedule.

    Args:
        facts: plain values of the checkpoint.

    Raises:
        InputError: other classes, or other training or held-out images.
    """
    check_classes(config, source.class_names, facts.get("class_names"), f"--resume: checkpoint {checkpoint}")
    saved = facts.get("fingerprints")
    if not isinstance(saved, dict):
        LOGGER.info("checkpoint %s does not tell its images: whether the data are the same is not checked", checkpoint)
        return
    for split, own in source.facts["fingerprints"].items():
        if (before := saved.get(split)) != own:
            images = before.get("images") if isinstance(before, dict) else None
            found = f"{own['images']}, the run has {images}; or with other names or labels"
            _refuse(config, f"--resume: the {split} images are not those of {checkpoint}: {found}")


def _refuse(config: Config, difference: str) -> None:
    if not config.data.allow_mismatch:
        raise InputError(f"{difference}; data.allow_mismatch=true goes on all the same")
    LOGGER.warning("WARNING: %s (data.allow_mismatch)", difference)
