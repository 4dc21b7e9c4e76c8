"""What a sub-model sees of its images: as a real forward shows it, and as pictures that any viewer can show.

Augmentations are wrapped by such as act as they do and note what they did. To learn where one takes its pixels from, or
which paths a module drops, the same code runs a second time on something that tells (pixels that hold their own
position, activations of one) under the same random numbers. The first run stays what it would have been, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import torch
from timm.models.efficientvit_msra import ResidualDrop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

import augsub
from augsub.augmentation import Images, StemFeatures, Tokens
from augsub.registry import AugmentationSpec

NOTED_ACTIVATIONS = 64  # of each call of a dropout: enough for a picture
PAPER = (255, 255, 255)  # behind what is removed
GHOST = 0.15  # share of the image that still shines through it, for orientation
MASK_TOKEN = (86, 180, 233)  # Okabe and Ito's sky blue, which colour-blind readers can tell from both others


class PixelState(IntEnum):
    """What became of a pixel of the main model's image in the sub-model."""

    VISIBLE = 0
    REMOVED = 1  # its token is gone, or a crop left it out: nothing is computed for it
    REPLACED = 2  # its stem features became the mask token
    ZEROED = 3  # set to zero


@dataclass(frozen=True)
class Hidden:
    """Cells that one augmentation hid.

    Attributes:
        state: what became of them.
        cells: which ones, (B, rows, columns) bool, at the resolution where it happened: patch tokens, stem
            features or pixels.
        boxes: the part of the image over which they spread, (B, 4) int64: top, left, height, width in pixels.
    """

    state: PixelState
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
    """One sub-forward.

    Attributes:
        images: what the main model sees, (B, C, H, W).
        inputs: what the sub-model's forward got, (B, C, h, w): smaller after a crop, zero where masked so.
        boxes: which part of the image that is, (B, 4) int64: top, left, height, width in pixels.
        crops: what a random crop left of the image, as `boxes`; differs from it where tokens were cropped.
        hidden: cells that augmentations hid, in order; removed tokens once per token sequence of the model.
        token_grid: (rows, columns) of the patch tokens before any was removed.
        droppings: calls of the "drop_path" and of the "dropout" modules (those after projections and in MLPs), in
            the order of the forward.
        logits: of the sub-model, (B, K).
    """

    images: Tensor
    inputs: Tensor
    boxes: Tensor
    crops: Tensor
    hidden: list[Hidden] = field(default_factory=list)
    token_grid: tuple[int, int] | None = None
    droppings: dict[str, list[Dropping]] = field(default_factory=lambda: {"drop_path": [], "dropout": []})
    logits: Tensor | None = None

    @cached_property
    def states(self) -> Tensor:
        """What became of every pixel of the images, (B, H, W) uint8, values of `PixelState`.

        Of several sequences of tokens any may see a pixel.
        """
        states = torch.full_like(self.images[:, 0], PixelState.REMOVED, dtype=torch.uint8)
        for sample, (top, left, height, width) in enumerate(self.boxes.tolist()):
            inside = states[sample, top : top + height, left : left + width]
            inside.fill_(PixelState.VISIBLE)
            removed = []
            for hidden in self.hidden:
                row, column, *size = hidden.boxes[sample].tolist()
                canvas = torch.zeros_like(states[sample], dtype=torch.bool)
                canvas[row : row + size[0], column : column + size[1]] = _spread(hidden.cells[sample], size)
                if hidden.state == PixelState.REMOVED:
                    removed.append(canvas)
                else:
                    inside[canvas[top : top + height, left : left + width]] = hidden.state
            if removed:
                states[sample][torch.stack(removed).all(dim=0)] = PixelState.REMOVED
        return states

    @cached_property
    def pixels(self) -> Tensor:
        """The sub-model's input at its place in the images, around it the images, (B, C, H, W)."""
        pixels = self.images.clone()
        for sample, (top, left, height, width) in enumerate(self.boxes.tolist()):
            shown = F.interpolate(self.inputs[sample : sample + 1], size=(height, width), mode="nearest-exact")
            pixels[sample, :, top : top + height, left : left + width] = shown[0]
        return pixels


@torch.no_grad()
def record(model: nn.Module, images: Tensor, augmentation: AugmentationSpec, seed: int) -> Recording:
    """Run the sub-model once and note what it sees.

    The model and the global random numbers stay as they are: it runs in evaluation mode, in which only its
    drop-path and dropout modules behave as in training.

    Args:
        model: a patched model, not wrapped.
        images: (B, C, H, W), as the main model takes them.
        augmentation: whatever `augsub.build` takes.
        seed: of everything that the augmentation draws.

    Raises:
        ValueError: the augmentation has no site in the model, or does not fit the images.
    """
    batch, _, height, width = images.shape
    whole = torch.tensor([0, 0, height, width], device=images.device).repeat(batch, 1)
    recording = Recording(images, images, whole, whole)
    names = {module: name for name, module in model.named_modules()}
    members = [_Watched(member, recording) for member in augsub.build(augmentation).members]
    sites = [site for site in recording.droppings if site in augsub.supports(model).values()]
    drops = [_DropWatcher(site, names, recording) for site in sites]
    training = {module: module.training for module in names}
    try:
        model.eval()
        with _same_random_numbers(images.device):
            torch.manual_seed(seed)
            recording.logits = model(images, augsub=augsub.Compose([*members, *drops]))
    finally:
        for watcher in drops:
            watcher.remove_hooks()
        for module, was_training in training.items():
            module.training = was_training
    return recording


class _Watched(augsub.SubModelAugmentation):
    """Does at every site what an augmentation does, and notes it."""

    def __init__(self, augmentation: augsub.SubModelAugmentation, recording: Recording) -> None:
        self._augmentation, self._recording = augmentation, recording
        self.name, self.sites, self.ratio = augmentation.name, augmentation.sites, augmentation.ratio
        self.resizes_images, self.module_state = augmentation.resizes_images, augmentation.module_state

    def image(self, images: Images) -> Images:
        recording, (height, width) = self._recording, images.values.shape[-2:]
        positions = torch.arange(1, height * width + 1, device=images.values.device, dtype=torch.float32)
        positions = positions.view(height, width).expand_as(images.values).contiguous()
        with _same_random_numbers(images.values.device):
            found = self._augmentation.image(Images(positions, images.stride)).values[:, 0]
        corners = _corners_of(found, width)
        if corners is not None:  # cropped or zeroed, else changed in place: the whole, whatever its size
            scale = recording.boxes[:, 2:] / torch.tensor([height, width], device=found.device)
            size = torch.tensor(found.shape[-2:], device=found.device)
            recording.boxes = recording.crops = _inside(recording.boxes, corners * scale, size * scale)
            if (found == 0).any():
                recording.hidden.append(Hidden(PixelState.ZEROED, found == 0, recording.boxes))
        augmented = self._augmentation.image(images)
        recording.inputs = augmented.values
        return augmented

    def tokens(self, tokens: Tokens) -> Tokens:
        return self._note_removed(tokens, self._augmentation.tokens(tokens))

    def windows(self, groups: Tokens) -> Tokens:
        return self._note_removed(groups, self._augmentation.windows(groups))

    def _note_removed(self, tokens: Tokens, augmented: Tokens) -> Tokens:
        recording, kept = self._recording, augmented.kept
        if tokens.kept is None:
            recording.token_grid = tokens.grid
        if kept is None or recording.token_grid is None:
            return augmented
        rows, columns = recording.token_grid
        cells = torch.ones(len(kept), rows * columns, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
        if tokens.kept is not None:
            recording.hidden.pop()  # the same sequence: its kept tokens count those removed before
        recording.hidden.append(Hidden(PixelState.REMOVED, cells.view(-1, rows, columns), recording.boxes))
        if augmented.grid is not None:  # they form a rectangle
            cell = recording.boxes[:, 2:] / torch.tensor(recording.token_grid, device=kept.device)
            first = kept.min(dim=1).values
            corner = torch.stack([first.div(columns, rounding_mode="floor"), first.remainder(columns)], dim=1)
            size = torch.tensor(augmented.grid, device=kept.device)
            recording.crops = _inside(recording.boxes, corner * cell, size * cell)
        return augmented

    def stem(self, features: StemFeatures) -> StemFeatures:
        augmented = self._augmentation.stem(features)
        replaced = (augmented.values == augmented.mask_token.to(augmented.values.dtype)).all(dim=-1)
        if replaced.any():
            self._recording.hidden.append(Hidden(PixelState.REPLACED, replaced, self._recording.boxes))
        return augmented


class _DropWatcher(augsub.SubModelAugmentation):
    """Notes what the modules of a site, ``drop_path`` or ``dropout``, let through, and lets them drop at all."""

    name = "drop_watcher"

    def __init__(self, site: str, names: dict[nn.Module, str], recording: Recording) -> None:
        self.sites = (site,)
        self._names, self._batch, self._droppings = names, len(recording.images), recording.droppings[site]
        self._hooks: dict[nn.Module, RemovableHandle] = {}

    def module_state(self, module: nn.Module) -> dict[str, bool]:
        if module not in self._hooks:  # it may stand at two places of the model
            self._hooks[module] = module.register_forward_pre_hook(self._note)
        return {"training": True}

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ones = torch.ones_like(inputs[0])
        with _same_random_numbers(ones.device):
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


def _same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside will be drawn again after it."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _corners_of(found: Tensor, width: int) -> Tensor | None:
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


def _inside(boxes: Tensor, corners: Tensor, sizes: Tensor) -> Tensor:
    """Boxes, (B, 4), from their corners, (B, 2), and sizes in other boxes, in pixels."""
    inner = torch.cat([corners, sizes], dim=1).round().long()
    inner[:, :2] += boxes[:, :2]
    return inner


def _spread(cells: Tensor, size: Sequence[int]) -> Tensor:
    """Cells (rows, columns) bool over an image of that size, (height, width) bool."""
    return F.interpolate(cells[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0].bool()


def render(recording: Recording, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """The images as the sub-model sees them, (B, 3, H, W) uint8.

    Removed parts fade to white, replaced ones are sky blue, zeroed ones have the colour that zero is.

    Args:
        recording: from `record`.
        mean: of each channel, as the images were normalised with; None stretches each image over the full range.
        std: likewise.
    """
    low, scale = _range(recording.images, mean, std)
    paper, mask_token = (
        torch.tensor(colour, dtype=torch.uint8, device=low.device).view(1, 3, 1, 1) for colour in (PAPER, MASK_TOKEN)
    )
    colours = _to_uint8((recording.pixels - low) / scale)
    ghost = GHOST * _to_uint8((recording.images - low) / scale) + (1 - GHOST) * paper
    states = recording.states.unsqueeze(1)
    colours = torch.where(states == PixelState.REMOVED, ghost.round().to(torch.uint8), colours)
    return torch.where(states == PixelState.REPLACED, mask_token, colours)


def render_main(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Normalised images (B, C, H, W) as the main model sees them, (B, 3, H, W) uint8; arguments as `render`."""
    low, scale = _range(images, mean, std)
    return _to_uint8((images - low) / scale)


def _to_uint8(images: Tensor) -> Tensor:
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
