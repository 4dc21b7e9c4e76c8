"""Corruptions computed on the fly, so that any images give a curve of robustness, not only ImageNet's.

The strengths are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261, and its published settings) for 224
pixels; lengths shrink with the image. What needs textures or is no simple formula there (frost, snow, fog, glass,
motion, zoom, elastic) is left out; of defocus and Gaussian blur the second is taken.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from engine.config import RGB, Config
from engine.data.images import Images
from engine.data.source import DataSource, build_source
from engine.errors import InputError

SIDE = 224  # pixels, for which lengths are given


def _noise(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return image + strength * torch.randn(image.shape, generator=generator)


def _shots(image: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(image * photons, generator) / photons


def _impulses(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(image.shape, generator=generator)
    return torch.where(drawn < share, (drawn < share / 2).float(), image)  # half of them white, half black


def _blur(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    sigma *= min(image.shape[1:]) / SIDE
    return gaussian_blur(image, 2 * int(3 * sigma + 1) + 1, [sigma])


def _brighten(image: Tensor, added: float, generator: torch.Generator) -> Tensor:
    value = image.amax(0, keepdim=True)  # of hue, saturation and value; grey where all is black
    return torch.where(value > 0, image * (value + added).clamp(max=1) / value.clamp(min=1e-6), added)


def _flatten(image: Tensor, contrast: float, generator: torch.Generator) -> Tensor:
    mean = image.mean((1, 2), keepdim=True)
    return (image - mean) * contrast + mean


def _pixelate(image: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    small = [max(1, int(side * scale)) for side in image.shape[1:]]
    return F.interpolate(F.interpolate(image[None], small, mode="area"), image.shape[1:], mode="nearest")[0]


def _compress(image: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(_to_bytes(image).permute(1, 2, 0).numpy()).save(file, "JPEG", quality=int(quality))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


def _to_bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().byte()


# What changes pixels in [0, 1], and its strength at the severities 1 to 5
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shots, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulses, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_blur, (1, 2, 3, 4, 6)),
    "brightness": (_brighten, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_flatten, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_compress, (25, 18, 15, 10, 7)),
}


@dataclass(frozen=True)
class Corruption:
    """One corruption of bytes (C, H, W) after a transform; what it draws follows from the image alone.

    Args:
        name: of the corruption.
        severity: 1 to 5.
        transform: of an image, to bytes.
    """

    name: str
    severity: int
    transform: Callable[[Any], Tensor]

    def __call__(self, image: Any) -> Tensor:
        pixels = self.transform(image)
        generator = torch.Generator().manual_seed(zlib.crc32(pixels.numpy().tobytes()))
        change, strengths = CORRUPTIONS[self.name]
        return _to_bytes(change(pixels.float() / 255, strengths[self.severity - 1], generator))


def corrupted(config: Config, known_classes: int = 0) -> dict[str, DataSource]:
    """The held-out images of a configuration under each corruption and severity, named "contrast/3".

    Args:
        known_classes: as of `build_source`.

    Raises:
        InputError: they are no images with red, green and blue.
    """
    source = build_source(config, with_training=False, known_classes=known_classes)
    if not isinstance(source.held_out, Images) or source.in_chans != RGB:
        has = f"data.dataset = {config.data.dataset} has none with {RGB} channels"
        raise InputError(f"--variant corrupted: needs photographs, {has}")
    if config.data.cache == "ram":
        source.held_out.decode_all()  # once for all of them
    return {
        f"{name}/{severity}": replace(
            source, held_out=source.held_out.seen_through(partial(Corruption, name, severity))
        )
        for name, (_, strengths) in CORRUPTIONS.items()
        for severity in range(1, 1 + len(strengths))
    }
