"""Watching a sub-forward from inside: augmentations that act as others do and note what they did.

To learn where an augmentation takes its pixels from, or which paths a module drops, the same code runs a second
time on something that tells (pixels that hold their own position, activations of one) under the same random
numbers. The first run stays what it would have been, to the bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from timm.models.efficientvit_msra import ResidualDrop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

import augsub
from augsub.views import Images, StemFeatures, Tokens

NOTED_ACTIVATIONS = 64  # of each call of a dropout: enough for a picture


class Fate(IntEnum):
    """What became of a pixel of the main model's image in the sub-model."""

    VISIBLE = 0
    REMOVED = 1  # its token is gone, or a crop left it out: nothing is computed for it
    REPLACED = 2  # its stem features became the mask token
    ZEROED = 3  # set to zero


@dataclass(frozen=True)
class Hidden:
    """Cells that one augmentation hid.

    Attributes:
        fate: what became of them.
        cells: which ones, (B, rows, columns) bool, at the resolution where it happened: patch tokens, stem
            features or pixels.
        boxes: the part of the image over which they spread, (B, 4) int64: top, left, height, width in pixels.
    """

    fate: Fate
    cells: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Dropping:
    """What one call of a drop-path or dropout module let through.

    Attributes:
        module: its name in the model.
        share: what it kept of each sample, (B,) float32; 0 or 1 for a path.
        kept: whether it kept the path, (B, 1) bool (more where a block sees an image in parts, as MobileViT's do),
            or each of the first activations, (B, at most 64) bool.
    """

    module: str
    share: Tensor
    kept: Tensor


@dataclass
class Recording:
    """Notes of one sub-forward.

    Attributes:
        images: what the sub-model's forward got, (B, C, h, w).
        boxes: which part of the main model's image that is, (B, 4) int64: top, left, height, width in pixels.
        crops: the same after crops of the token grid.
        token_grid: (rows, columns) of the patch tokens before any was removed.
        streams: removed tokens, once per token sequence of the model.
        hidden: everything else that was hidden, in order.
        droppings: calls of "drop_path" and of "dropout" modules, in order.
    """

    images: Tensor
    boxes: Tensor
    crops: Tensor
    token_grid: tuple[int, int] | None = None
    streams: list[Hidden] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    droppings: dict[str, list[Dropping]] = field(default_factory=lambda: {"drop_path": [], "dropout": []})

    @classmethod
    def of(cls, images: Tensor) -> Recording:
        """Nothing has happened to the images (B, C, H, W) yet."""
        batch, _, height, width = images.shape
        whole = torch.tensor([0, 0, height, width], device=images.device).repeat(batch, 1)
        return cls(images, whole, whole)


class RecordedAugmentation(augsub.SubModelAugmentation):
    """Does at every site what `augmentation` does, and notes it."""

    def __init__(self, augmentation: augsub.SubModelAugmentation, recording: Recording) -> None:
        self._augmentation = augmentation
        self._recording = recording
        self.name, self.sites, self.ratio = augmentation.name, augmentation.sites, augmentation.ratio
        self.resizes_images = augmentation.resizes_images
        self.module_state = augmentation.module_state

    def image(self, images: Images) -> Images:
        recording, (height, width) = self._recording, images.values.shape[-2:]
        positions = torch.arange(1, height * width + 1, device=images.values.device, dtype=torch.float32)
        positions = positions.view(height, width).expand_as(images.values).contiguous()
        with same_random_numbers(images.values.device):
            found = self._augmentation.image(Images(positions, images.stride)).values[:, 0]
        corners = corners_of(found, width)
        if corners is not None:  # cropped or zeroed, else changed in place: the whole, whatever its size
            scale = recording.boxes[:, 2:] / torch.tensor([height, width], device=found.device)
            size = torch.tensor(found.shape[-2:], device=found.device)
            shown = torch.cat([corners * scale, size * scale], dim=1).round().long()
            shown[:, :2] += recording.boxes[:, :2]
            recording.boxes = recording.crops = shown
            if (found == 0).any():
                recording.hidden.append(Hidden(Fate.ZEROED, found == 0, shown))
        augmented = self._augmentation.image(images)
        recording.images = augmented.values
        return augmented

    def tokens(self, tokens: Tokens) -> Tokens:
        return self._note_removed(tokens, self._augmentation.tokens(tokens))

    def windows(self, groups: Tokens) -> Tokens:
        return self._note_removed(groups, self._augmentation.windows(groups))

    def _note_removed(self, tokens: Tokens, augmented: Tokens) -> Tokens:
        recording = self._recording
        if tokens.kept is None:
            recording.token_grid = tokens.grid
        if augmented.kept is None or recording.token_grid is None:
            return augmented
        rows, columns = recording.token_grid
        batch, device = len(augmented.kept), augmented.kept.device
        cells = torch.ones(batch, rows * columns, dtype=torch.bool, device=device).scatter_(1, augmented.kept, False)
        if tokens.kept is not None:
            recording.streams.pop()  # the same sequence: its kept tokens count those removed before
        recording.streams.append(Hidden(Fate.REMOVED, cells.view(batch, rows, columns), recording.boxes))
        if augmented.grid is not None:
            recording.crops = token_crops(augmented, recording.token_grid, recording.boxes)
        return augmented

    def stem(self, features: StemFeatures) -> StemFeatures:
        augmented = self._augmentation.stem(features)
        replaced = (augmented.values == augmented.mask_token.to(augmented.values.dtype)).all(dim=-1)
        if replaced.any():
            self._recording.hidden.append(Hidden(Fate.REPLACED, replaced, self._recording.boxes))
        return augmented


class DropRecorder(augsub.SubModelAugmentation):
    """Notes what the modules of a site, ``drop_path`` or ``dropout``, let through, and lets them drop at all."""

    name = "drop_recorder"

    def __init__(self, site: str, module_names: dict[nn.Module, str], recording: Recording) -> None:
        self.sites = (site,)
        self._names = module_names
        self._batch = len(recording.images)
        self._droppings = recording.droppings[site]
        self._hooks: dict[nn.Module, RemovableHandle] = {}

    def module_state(self, module: nn.Module) -> dict[str, bool]:
        if module not in self._hooks:  # it may stand at two places of the model
            self._hooks[module] = module.register_forward_pre_hook(self._note)
        return {"training": True}

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ones = torch.ones_like(inputs[0])
        with same_random_numbers(ones.device):
            output = module.forward(ones)
        if isinstance(module, ResidualDrop):  # adds the input to its branch
            output = output - ones
        kept = (output != 0).flatten(1)
        if not isinstance(module, nn.Dropout):
            kept = kept.any(dim=1)
        kept = kept.reshape(self._batch, -1)  # Swin's attention has the windows of an image one after the other
        self._droppings.append(Dropping(self._names[module], kept.float().mean(dim=1), kept[:, :NOTED_ACTIVATIONS]))

    def remove_hooks(self) -> None:
        """Stop watching."""
        for hook in self._hooks.values():
            hook.remove()


def same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside will be drawn again after it."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def corners_of(found: Tensor, width: int) -> Tensor | None:
    """Where crops were cut out.

    Args:
        found: (B, h, w) position of every pixel in the image it comes from, counted from 1 in rows of `width`
            pixels; 0 is a pixel that was set to zero.

    Returns:
        (top, left) of each sample, (B, 2) int64; None if the pixels are no crops of their images.
    """
    source = (found - 1).long()
    rows = source.div(width, rounding_mode="floor") - torch.arange(found.shape[1], device=found.device)[:, None]
    columns = source.remainder(width) - torch.arange(found.shape[2], device=found.device)
    offsets = torch.stack([rows, columns], dim=1).flatten(2)
    hidden = (found == 0).flatten(1)[:, None]
    corners = offsets.masked_fill(hidden, -1).amax(dim=2)
    is_window = (found == found.round()).all() and ((offsets == corners[:, :, None]) | hidden).all()
    return corners if is_window and (corners >= 0).all() else None


def token_crops(tokens: Tokens, grid: tuple[int, int], boxes: Tensor) -> Tensor:
    """Part of the image, as `boxes`, under tokens that form a rectangle of the grid."""
    cell = boxes[:, 2:] / torch.tensor(grid, device=boxes.device)
    first = tokens.kept.min(dim=1).values
    corner = torch.stack([first.div(grid[1], rounding_mode="floor"), first.remainder(grid[1])], dim=1)
    crops = torch.cat([corner * cell, torch.tensor(tokens.grid, device=boxes.device) * cell], dim=1).round().long()
    crops[:, :2] += boxes[:, :2]
    return crops


def spread(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells (rows, columns) bool over an image of that size, (height, width) bool."""
    return F.interpolate(cells[None, None].float(), size=size, mode="nearest-exact")[0, 0].bool()
