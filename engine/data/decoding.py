"""From an image file of any kind to 8-bit RGB."""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

EIGHT_BITS, SIXTEEN_BITS = 255, 65535
STEP = SIXTEEN_BITS // EIGHT_BITS  # 257 values of 16 bits share one of 8 bits


class DecodingError(Exception):
    """A file holds no whole image; the message is the reason, in a few words."""


def decode(file: BinaryIO) -> Image.Image:
    """The image in an open file, or its first frame, as RGB.

    Pixels are as they are stored: an EXIF orientation is not applied, as timm and torchvision do not. Weights are
    pretrained and published numbers measured without it, and whoever predicts with timm later sees the same.

    Raises:
        DecodingError: not an image, a part of one, or one that is too large to be one.
    """
    try:
        return to_rgb(Image.open(file))
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
        raise DecodingError(_reason(error, file)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue; transparency is dropped, as timm and torchvision do.

    Pillow's own conversion would clip 16-bit and floating-point pixels at 255.
    """
    if image.mode == "F":
        return _gray(_float_to_8_bits(np.asarray(image)))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _gray(_integer_to_8_bits(np.asarray(image)))
    image.load()
    image.info.pop("transparency", None)  # changes no pixel, but Pillow would warn that it is lost
    return image.convert("RGB")


def reason_of(error: Exception) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reason(error: Exception, file: BinaryIO) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return reason_of(error)
    return "not an image that Pillow knows" if file.seek(0, os.SEEK_END) else "the file is empty"


def _gray(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def _integer_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """The nearest of 256 values, (H, W); numbers beyond 16 bits fill the range between their extremes."""
    pixels = pixels.astype(np.int64)
    if pixels.min() < 0 or pixels.max() > SIXTEEN_BITS:
        return _stretch(pixels.astype(np.float64))
    return ((pixels + STEP // 2) // STEP).astype(np.uint8)


def _float_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """A float file does not tell its range, (H, W): the first one of 1, 255 and 65535 that holds all its pixels."""
    finite = pixels[np.isfinite(pixels)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    pixels = np.nan_to_num(pixels.astype(np.float64), nan=low, posinf=high, neginf=low)
    for brightest in (1, EIGHT_BITS, SIXTEEN_BITS):
        if low >= 0 and high <= brightest:
            return np.rint(pixels * (EIGHT_BITS / brightest)).astype(np.uint8)
    return _stretch(pixels)


def _stretch(pixels: np.ndarray) -> np.ndarray:
    low, high = pixels.min(), pixels.max()
    return np.rint((pixels - low) * (EIGHT_BITS / max(high - low, 1e-300))).astype(np.uint8)
