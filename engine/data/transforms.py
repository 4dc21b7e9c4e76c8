"""From a decoded image to a tensor of bytes, by timm's transforms, and what follows on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Compose

from engine.config import UNTRANSFORMED, Config, TransformConfig
from engine.data.files import DecodingError
from engine.errors import input_errors

Transform = Callable[[Any], Tensor]
LONGEST = 8  # times the shorter side; the crop takes one at most, and interpolation looks a few pixels further
POSTERIZING = ("Posterize", "PosterizeOriginal", "PosterizeIncreasing")


def pixel_dtype(config: Config) -> torch.dtype:
    """What a run's data set gives: bytes, or floats that are used as they are."""
    return torch.float32 if config.data.dataset in UNTRANSFORMED else torch.uint8


def normalisation(config: Config) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation by which a run's images are normalised; None for images used as they are."""
    is_normalised = pixel_dtype(config) == torch.uint8
    return (config.transform.mean, config.transform.std) if is_normalised else (None, None)


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the highest bits of every pixel; of none it is black.

    RandAugment asks for 0 bits at the magnitude 10. Earlier versions of Pillow gave a black image, Pillow 13 refuses.
    """
    if bits == 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def build_train_transform(config: TransformConfig, image_size: int) -> Transform:
    """Random crop and flips, then colours: (C, H, W) uint8."""
    with input_errors("transform"):
        transform = create_transform(
            image_size,
            is_training=True,
            scale=tuple(config.scale),
            ratio=tuple(config.ratio),
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=tuple(config.mean),
            std=tuple(config.std),
            normalize=False,
        )
    for part in transform.transforms:
        for operation in (*getattr(part, "ops", ()), *(op for policy in getattr(part, "policy", ()) for op in policy)):
            if operation.name in POSTERIZING:
                operation.aug_fn = posterize
    return transform


def middle(image: Image.Image) -> Image.Image:
    """The middle of a long image, about `LONGEST` times as long as wide: a centre crop sees nothing of the ends.

    Enlarging a strip of 60,000 x 1 pixels as a whole, before the crop, would take 17 GB. Cut off are as many pixels as
    become an even number in the resized image, so that the crop is rounded to the same place.
    """
    short = min(image.size)
    left, top = (max(0, side - LONGEST * short) // (4 * short) * 2 * short for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def refuse_slivers(image: Image.Image, longest: int) -> Image.Image:
    """The image, unless timm's border mode, which makes `longest` of its longer side, leaves no pixel of the other.

    Raises:
        DecodingError: it does.
    """
    if round(min(image.size) / (max(image.size) / longest)) == 0:  # as timm rounds
        size = f"{image.width} x {image.height}"
        raise DecodingError(f"{size} pixels, of which transform.eval_crop_mode=border leaves less than a row")
    return image


def build_eval_transform(config: TransformConfig, image_size: int) -> Transform:
    """Resize the shorter side to image_size / eval_crop, crop the centre: (C, H, W) uint8."""
    with input_errors("transform"):
        transform = create_transform(
            image_size,
            interpolation=config.eval_interpolation,
            mean=tuple(config.mean),
            std=tuple(config.std),
            crop_pct=config.eval_crop,
            crop_mode=config.eval_crop_mode,
            normalize=False,
        )
    if config.eval_crop_mode == "center":
        return Compose([middle, transform])
    if config.eval_crop_mode == "border":
        return Compose([partial(refuse_slivers, longest=int(image_size / config.eval_crop)), transform])
    return transform


def random_erasing(config: TransformConfig, device: torch.device) -> RandomErasing:
    """timm's, of normalised images (B, C, H, W) on the device."""
    (min_area, max_area), (min_aspect, max_aspect) = config.erase_area, config.erase_aspect
    return RandomErasing(
        config.random_erase,
        min_area=min_area,
        max_area=max_area,
        min_aspect=min_aspect,
        max_aspect=max_aspect,
        mode=config.erase_mode,
        max_count=config.erase_count,
        device=device,
    )


class Normalise:
    """8-bit images to floats, as torchvision's ToTensor and Normalize make them; floats stay as they are.

    Args:
        mean, std: one number per channel, of pixels between 0 and 1.
        device: where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (…, C, H, W), uint8 in and float32 out."""
        if images.dtype != torch.uint8:
            return images
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class Delivery:
    """Brings batches to the device. A GPU copies a batch while it still computes with the one before.

    Args:
        device: of the model.
        transforms: of images (B, C, H, W), on the device, in their order.
    """

    def __init__(self, device: torch.device, transforms: Sequence[Callable[[Tensor], Tensor]] = ()) -> None:
        self._device = device
        self.transforms = transforms
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) on the device, the images ready for the model."""
        images, labels = self._copy(images), self._copy(labels)
        for transform in self.transforms:
            images = transform(images)
        return images, labels

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._copying is None:
            return tensor.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            copy = tensor.to(self._device, non_blocking=True)
        computing.wait_stream(self._copying)
        copy.record_stream(computing)  # its memory is not for the next copy while it is computed with
        return copy


def build_delivery(config: Config, device: torch.device, is_training: bool) -> Delivery:
    """The delivery of a run's training or held-out images."""
    transforms: list[Callable[[Tensor], Tensor]] = []
    mean, std = normalisation(config)
    if mean is not None and std is not None:
        transforms.append(Normalise(mean, std, device))
        if is_training and config.transform.random_erase:
            transforms.append(random_erasing(config.transform, device))
    if config.train.channels_last:
        transforms.append(_channels_last)
    return Delivery(device, transforms)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
