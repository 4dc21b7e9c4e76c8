"""From a decoded image to a tensor of bytes, by timm's transforms, and what follows on the device."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Grayscale
from torchvision.transforms.functional import pil_modes_mapping

from engine.config import PHOTOGRAPHS, UNTRANSFORMED, Config, image_channels, sides
from engine.data.images import Needed
from engine.errors import input_errors

POSTERIZING = ("Posterize", "PosterizeOriginal", "PosterizeIncreasing")


def normalisation(config: Config) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of each channel, of red's, green's and blue's the average where there are others.

    None of images that are used as they are.
    """
    if config.data.dataset in UNTRANSFORMED:
        return None, None
    count, given = image_channels(config.data), (config.transform.mean, config.transform.std)
    mean, std = ([*values] if len(values) == count else [sum(values) / len(values)] * count for values in given)
    return mean, std


def posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the highest bits of every pixel; of none it is black.

    RandAugment asks for 0 bits at the magnitude 10. Earlier versions of Pillow gave a black image, Pillow 13 refuses.
    """
    if bits == 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


class ReducedCrop:
    """timm's random resized crop, of an image of which no more is decoded than it needs.

    Args:
        crop: timm's.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self._crop = crop

    def needed(self, size: tuple[int, int]) -> Needed:
        """Draws which part of an image of (width, height) pixels is looked at."""
        blank = torch.empty((0, *size[::-1]))  # which has a size
        top, left, height, width = self._crop.get_params(blank, self._crop.scale, self._crop.ratio)
        box = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
        return Needed(largest_divisor((width, height), self._crop.size), box)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The part that `needed` has drawn, in the size of the output."""
        modes = self._crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
        box = [share * side for share, side in zip(image.info[Needed.BOX], image.size * 2, strict=True)]
        return image.resize(self._crop.size[::-1], pil_modes_mapping[mode], box)


def needed_for(size: tuple[int, int], side: int) -> Needed:
    """What an image of (width, height) pixels may be reduced to, so that its shorter side is no shorter than `side`."""
    return Needed(largest_divisor(size, (side, side)))


def largest_divisor(size: Sequence[int], wanted: Sequence[int]) -> int:
    """By what sides may be divided, 1, 2, 4 or 8, so that none is shorter than is wanted."""
    return next(divisor for divisor in (8, 4, 2, 1) if divisor == 1 or min(size) >= divisor * max(wanted))


def build_transform(config: Config, is_training: bool) -> Callable[[Any], Tensor]:
    """To (C, H, W) uint8: random crop and flips, then colours; in evaluation the shorter side is resized to
    image_size / eval_crop, and the centre cropped. Of images with other channels than colours (C, H, W) float32.

    With `data.draft_decoding` its first step says what it needs of a JPEG, so that less is decoded.
    """
    transform, image_size = config.transform, config.data.image_size
    mean, std = normalisation(config)
    training = {
        "scale": tuple(transform.scale),
        "ratio": tuple(transform.ratio),
        "hflip": transform.hflip,
        "vflip": transform.vflip,
        "color_jitter": transform.color_jitter,
        "auto_augment": transform.auto_augment,
    }
    evaluation = {"crop_pct": transform.eval_crop, "crop_mode": transform.eval_crop_mode}
    with input_errors("transform"):
        built = create_transform(
            (3, *sides(image_size)),
            is_training=is_training,
            interpolation=transform.interpolation if is_training else transform.eval_interpolation,
            mean=mean,
            std=std,
            normalize=False,
            **(training if is_training else evaluation),
        )
    for part in built.transforms:
        for operation in (*getattr(part, "ops", ()), *(op for policy in getattr(part, "policy", ()) for op in policy)):
            if operation.name in POSTERIZING:
                operation.aug_fn = posterize
    if config.data.in_chans == 1:
        built.transforms.insert(-1, Grayscale())  # a colour policy's own grey has three channels
    if config.data.draft_decoding and image_channels(config.data) in PHOTOGRAPHS:
        if is_training:
            built.transforms[0] = ReducedCrop(built.transforms[0])
        else:  # timm's own resize, of which the image's shorter side becomes this one
            side = math.ceil(max(sides(image_size)) / (transform.eval_crop or 1))
            built.transforms[0].needed = partial(needed_for, side=side)
    return built


class Normalise:
    """Images to floats as torchvision's ToTensor and Normalize make them.

    Args:
        mean, std: one number per channel, of pixels between 0 and 1.
        device: where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (…, C, H, W), uint8 or between 0 and 1 in, and float32 out."""
        pixels = images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        return pixels.sub_(self.mean).div_(self.std)


class Delivery:
    """Brings a run's batches to the device. A GPU copies a batch while it still computes with the one before.

    Attributes:
        transforms: of images (B, C, H, W), on the device, in their order.
    """

    def __init__(self, config: Config, device: torch.device, is_training: bool) -> None:
        self._device = device
        self._memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.transforms: list[Callable[[Tensor], Tensor]] = []
        (mean, std), transform = normalisation(config), config.transform
        if mean is not None and std is not None:
            self.transforms.append(Normalise(mean, std, device))
            if is_training and transform.random_erase:
                bounds = (*transform.erase_area, *transform.erase_aspect)
                options = {"mode": transform.erase_mode, "max_count": transform.erase_count, "device": device}
                self.transforms.append(RandomErasing(transform.random_erase, *bounds, **options))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) on the device, the images ready for the model."""
        images, labels = self._copy(images), self._copy(labels)
        for transform in self.transforms:
            images = transform(images)
        return images.contiguous(memory_format=self._memory_format), labels

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._copying is None:
            return tensor.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            copy = tensor.to(self._device, non_blocking=True)
        computing.wait_stream(self._copying)
        copy.record_stream(computing)  # its memory is not for the next copy while it is computed with
        return copy
