"""Image folders and every other data set that timm can open, with timm's transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from engine.config import UNTRANSFORMED, Config, DataConfig, TransformConfig
from engine.data.files import ImageFolder, naming_bad_files, to_rgb
from engine.data.source import DataSource, build_digits, build_synthetic
from engine.data.transforms import build_eval_transform, build_train_transform
from engine.errors import InputError
from engine.text import readable_name

# The names under which the folder of a split is looked for: timm's, and test
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))
KINDS = ("torch", "hfds")  # timm's others, hfids, tfds and wds, are streams, in which no image has a number


def build_source(config: Config) -> DataSource:
    """The data set that `data.dataset` names."""
    data = config.data
    if data.dataset == "digits":
        return build_digits(data.image_size)
    if data.dataset == "synthetic":
        return build_synthetic(data.image_size, data.synthetic_samples)
    return build_images(data, config.transform)


def build_held_out_source(config: Config) -> DataSource:
    """The held-out images alone of the data set that `data.dataset` names, of which more need not be there."""
    if config.data.dataset in UNTRANSFORMED:
        return build_source(config)
    return build_held_out_images(config.data, config.transform)


def build_images(data: DataConfig, transform: TransformConfig) -> DataSource:
    """Open both splits; the training split decides the classes.

    Raises:
        InputError: no root, no folder for a split, a class without images, splits with different
            classes, one class only, or a data set that timm cannot open.
    """
    train = _open(data, data.train_split, build_train_transform(transform, data.image_size))
    held_out = _open(data, data.eval_split, build_eval_transform(transform, data.image_size))
    classes, held_out_classes = _class_to_idx(train) or {}, _class_to_idx(held_out) or {}
    if differing := sorted(classes.keys() ^ held_out_classes.keys()):
        raise InputError(f"data.root = {data.root}: classes in one split only: {', '.join(map(str, differing[:5]))}")
    if classes != held_out_classes:
        raise InputError(f"data.root = {data.root}: the splits number their classes differently")
    return _source(data, held_out, naming_bad_files(train, "training"))


def build_held_out_images(data: DataConfig, transform: TransformConfig) -> DataSource:
    """Open the held-out split alone, which decides the classes; the training split need not be there.

    Raises:
        InputError: as `build_images`.
    """
    held_out = _open(data, data.eval_split, build_eval_transform(transform, data.image_size))
    return _source(data, held_out, train=None)


def _source(data: DataConfig, held_out: Dataset, train: Dataset | None) -> DataSource:
    """Both splits number their classes alike, so that the held-out one tells them.

    Raises:
        InputError: there is one class only, of which every model is right.
    """
    class_names = _class_names(held_out, data)
    if len(class_names) < 2:
        raise InputError(f"data.root = {data.root}: the only class is {class_names[0]}, at least two are needed")
    return DataSource(
        train=train,
        held_out=naming_bad_files(held_out, "held-out"),
        num_classes=len(class_names),
        in_chans=3,
        class_names=class_names,
    )


def _open(data: DataConfig, split: str, transform: Any) -> Dataset:
    dataset = _open_folder(data, split) if data.dataset == "folder" else _open_named(data, split)
    is_rgb = isinstance(dataset, ImageDataset)  # torchvision's sets give what the file holds, of MNIST one channel
    dataset.transform = transform if is_rgb else Compose([to_rgb, transform])
    return dataset


def _open_folder(data: DataConfig, split: str) -> ImageDataset:
    folder = split_folder(root_of(data), split)
    return ImageDataset(str(folder), reader=ImageFolder(folder))


def _open_named(data: DataConfig, split: str) -> Dataset:
    if data.dataset.partition("/")[0].lower() not in KINDS:
        known = ", ".join(f"{kind}/NAME" for kind in KINDS)
        raise InputError(f"data.dataset = {data.dataset}: allowed is folder, digits, synthetic, or timm's {known}")
    try:
        return create_dataset(data.dataset, root=data.root, split=split)
    except ImportError as error:
        raise InputError(f"data.dataset = {data.dataset}: needs a package that is not installed: {error}") from error
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        raise InputError(f"data.dataset = {data.dataset}, root = {data.root}, split {split}: {error}") from error


def _num_classes(dataset: Any, data: DataConfig) -> int:
    class_to_idx = _class_to_idx(dataset)
    if not class_to_idx:
        raise InputError(f"data.dataset = {data.dataset}: does not tell its classes")
    return max(class_to_idx.values()) + 1


def _class_to_idx(dataset: Any) -> dict[str, int] | None:
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)


def _class_names(dataset: Any, data: DataConfig) -> list[str]:
    """By number; a number that no class has is its own name."""
    names = {number: readable_name(str(name)) for name, number in _class_to_idx(dataset).items()}
    return [names.get(number, str(number)) for number in range(_num_classes(dataset, data))]


def root_of(data: DataConfig) -> Path:
    """`data.root`, which must be set."""
    if data.root is None:
        raise InputError("data.root is not set: it names the folder with the training and the held-out images")
    return Path(data.root)


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split, under any of its names.

    Raises:
        InputError: there is none.
    """
    if not root.is_dir():
        raise InputError(f"data.root = {root}: no such folder")
    synonyms = next((names for names in SPLIT_NAMES if split in names), ())
    for name in (split, *synonyms):
        if (root / name).is_dir():
            return root / name
    raise InputError(f"data.root = {root}: no folder for the split {split} (any of {', '.join({split, *synonyms})})")
