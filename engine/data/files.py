"""Data sets that say which image cannot be read, instead of giving another one or an error of their own."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from engine.data.bad_files import UnreadableImage
from engine.data.decoding import DecodingError, decode, reason_of


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
