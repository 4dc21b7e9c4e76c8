"""Images with other channels than red, green and blue, or grey: satellites', microscopes', with transparency."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from engine.errors import input_errors

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how files begin, the last two those of more than 4 GB


def decode_channels(source: BinaryIO | Image.Image, in_chans: int, max_megapixels: float) -> Tensor:
    """All channels of an image (C, H, W) float32, for timm's crops and flips.

    Integers are between 0 and 1 by the range of their type; floats stay as they are.

    Args:
        in_chans: how many there must be.
        max_megapixels: larger images are refused.

    Raises:
        ValueError: other channels or more pixels; on damaged bytes decoders raise whatever they stumble over.
    """
    pixels = _tiff(source) if not isinstance(source, Image.Image) and _is_tiff(source) else _frames(source)
    channels, height, width = pixels.shape
    if channels != in_chans:
        raise ValueError(f"has {channels} channels, data.in_chans = {in_chans}")
    if width * height > max_megapixels * 1e6:
        raise ValueError(f"{width} x {height} pixels are more than data.max_megapixels = {max_megapixels:g} allows")
    if pixels.dtype.kind in "ui":
        pixels = pixels / np.float32(np.iinfo(pixels.dtype).max)
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


def _is_tiff(source: BinaryIO) -> bool:
    start = source.read(4)
    source.seek(0)
    return start in TIFF


def _tiff(source: BinaryIO) -> np.ndarray:
    """The first series of a TIFF file, (C, H, W), whether its channels are pages or lie in each pixel."""
    with input_errors("TIFF needs another package, pip install 'augsub[tiff]'"):
        from tifffile import TiffFile  # Pillow knows no pixels of more than four channels
    with TiffFile(source) as file:
        series = file.series[0]
        pixels, axes = series.asarray(), series.axes
    pixels = np.moveaxis(pixels, (axes.index("Y"), axes.index("X")), (-2, -1))
    return pixels.reshape(-1, *pixels.shape[-2:])


def _frames(source: BinaryIO | Image.Image) -> np.ndarray:
    """The bands of all frames that Pillow finds, (C, H, W)."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    frames = [np.atleast_3d(np.asarray(frame)) for frame in ImageSequence.Iterator(image)]
    return np.concatenate(frames, axis=-1).transpose(2, 0, 1)
