"""What a sub-model sees, as pictures that any viewer can show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.recording import Fate
from models.seen import Seen

PAPER = (255, 255, 255)  # behind what is removed
GHOST = 0.15  # share of the image that still shines through it, for orientation
MASK_TOKEN = (86, 180, 233)  # Okabe and Ito's sky blue, which colour-blind readers can tell from both others


def render(seen: Seen, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """The images as the sub-model sees them, (B, 3, H, W) uint8.

    Removed parts fade to white, replaced ones are sky blue, zeroed ones have the colour that zero is.

    Args:
        seen: from `models.seen.see`.
        mean: of each channel, as the images were normalised with; None stretches each image over the full range.
        std: likewise.
    """
    low, scale = _range(seen.images, mean, std)
    colours = to_uint8((seen.pixels - low) / scale)
    ghost = GHOST * to_uint8((seen.images - low) / scale) + (1 - GHOST) * _colour(PAPER, colours)
    fates = seen.fates.unsqueeze(1)
    colours = torch.where(fates == Fate.REMOVED, ghost.round().to(torch.uint8), colours)
    return torch.where(fates == Fate.REPLACED, _colour(MASK_TOKEN, colours), colours)


def render_main(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Normalised images (B, C, H, W) as the main model sees them, (B, 3, H, W) uint8; arguments as `render`."""
    low, scale = _range(images, mean, std)
    return to_uint8((images - low) / scale)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] as (B, 3, H, W) uint8; other than three channels become their mean, grey."""
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _range(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """What is black in the images, and the distance from there to white, broadcastable to them."""
    if mean is None or std is None:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        return low, (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return -mean / std, 1 / std


def _colour(rgb: tuple[int, int, int], like: Tensor) -> Tensor:
    return torch.tensor(rgb, dtype=torch.uint8, device=like.device).view(1, 3, 1, 1)
