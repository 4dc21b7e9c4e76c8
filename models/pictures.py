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

import torch
from timm.models.efficientvit_msra import ResidualDrop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

import augsub
from augsub.augmentation import Images, StemFeatures, Tokens
from augsub.registry import AugmentationSpec

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
        kept: what the calls of "drop_path" and of "dropout" modules (those after projections and in MLPs) let through,
            in the order of the forward: activations (B, n) bool, or the path of each image, (B, 1) bool (more where a
            block sees an image in parts, as MobileViT's do).
        logits: of the sub-model, (B, K).
    """

    images: Tensor
    inputs: Tensor
    boxes: Tensor
    crops: Tensor
    hidden: list[Hidden] = field(default_factory=list)
    token_grid: tuple[int, int] | None = None
    kept: dict[str, list[Tensor]] = field(default_factory=lambda: {"drop_path": [], "dropout": []})
    logits: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """What became of every pixel of the images, (B, H, W) uint8, values of `PixelState`.

        Of several sequences of tokens any may see a pixel.
        """
        nothing = torch.zeros_like(self.images[:, :1], dtype=torch.float32)
        inside = _put(nothing + 1, self.boxes, nothing).bool()
        states = torch.where(inside, PixelState.VISIBLE, PixelState.REMOVED)
        removed = []
        for hidden in self.hidden:
            cells = _put(hidden.cells[:, None].float(), hidden.boxes, nothing).bool()
            if hidden.state == PixelState.REMOVED:
                removed.append(cells)
            else:
                states[cells & inside] = hidden.state
        if removed:
            states[torch.stack(removed).all(dim=0)] = PixelState.REMOVED
        return states[:, 0].to(torch.uint8)

    @property
    def pixels(self) -> Tensor:
        """The sub-model's input at its place in the images, around it the images, (B, C, H, W)."""
        return _put(self.inputs, self.boxes, self.images)


def _put(values: Tensor, boxes: Tensor, canvas: Tensor) -> Tensor:
    """A copy of a canvas (B, C, H, W) with values (B, C, h, w) spread over a box of it, (B, 4)."""
    canvas = canvas.clone()
    for sample, (top, left, height, width) in enumerate(boxes.tolist()):
        spread = F.interpolate(values[sample : sample + 1], size=(height, width), mode="nearest-exact")
        canvas[sample, :, top : top + height, left : left + width] = spread[0]
    return canvas


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
    whole = torch.tensor([0, 0, *images.shape[2:]], device=images.device).repeat(len(images), 1)
    recording = Recording(images, images, whole, whole)
    members = [_Watched(member, recording) for member in augsub.build(augmentation).members]
    sites = [site for site in recording.kept if site in augsub.supports(model).values()]
    drops = [_DropWatcher(site, recording) for site in sites]
    training = {module: module.training for module in model.modules()}
    try:
        with _same_random_numbers(images):
            torch.manual_seed(seed)
            recording.logits = model.eval()(images, augsub=augsub.Compose([*members, *drops]))
    finally:
        for hook in (hook for watcher in drops for hook in watcher.hooks.values()):
            hook.remove()
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
        positions = torch.arange(1.0, height * width + 1, device=images.values.device).view(height, width)
        with _same_random_numbers(images.values):
            told = positions.expand_as(images.values).contiguous()
            found = self._augmentation.image(Images(told, images.stride)).values[:, 0]
        corners = _corners_of(found, width)
        if corners is not None:  # cropped or zeroed, else changed in place: the whole, whatever its size
            recording.boxes = recording.crops = _inside(recording.boxes, corners, found.shape[1:], (height, width))
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
            first = kept.min(dim=1).values
            corners = torch.stack([first // columns, first % columns], dim=1)
            recording.crops = _inside(recording.boxes, corners, augmented.grid, recording.token_grid)
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

    def __init__(self, site: str, recording: Recording) -> None:
        self.sites = (site,)
        self.hooks: dict[nn.Module, RemovableHandle] = {}
        self._batch, self._kept = len(recording.images), recording.kept[site]

    def module_state(self, module: nn.Module) -> dict[str, bool]:
        if module not in self.hooks:  # it may stand at two places of the model
            self.hooks[module] = module.register_forward_pre_hook(self._note)
        return {"training": True}

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ones, is_residual = torch.ones_like(inputs[0]), isinstance(module, ResidualDrop)
        # which adds its branch to the input; a branch may be zero by itself, one that is the input is not
        watched = ResidualDrop(nn.Identity(), module.drop) if is_residual else module
        with _same_random_numbers(ones):
            output = watched.forward(ones) - is_residual * ones
        kept = (output != 0).flatten(1)
        if not isinstance(module, nn.Dropout):
            kept = kept.any(dim=1)
        self._kept.append(kept.reshape(self._batch, -1))  # Swin's attention has an image's windows one after the other


def _same_random_numbers(tensor: Tensor) -> AbstractContextManager[None]:
    """What is drawn inside on the tensor's device will be drawn again after it."""
    device = tensor.device
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def _corners_of(found: Tensor, width: int) -> Tensor | None:
    """Where crops were cut out.

    Args:
        found: (B, h, w) position of every pixel in the image it comes from, counted from 1 in rows of `width`
            pixels; 0 is a pixel that was set to zero.

    Returns:
        (top, left) of each sample, (B, 2) int64; None if the pixels are no crops of their images.
    """
    source, hidden = (found - 1).long(), (found == 0)[:, None]
    own = torch.meshgrid(*(torch.arange(side, device=found.device) for side in found.shape[1:]), indexing="ij")
    offsets = torch.stack([source // width, source % width], dim=1) - torch.stack(own)
    corners = offsets.masked_fill(hidden, -1).amax(dim=(2, 3))
    is_window = (found == found.round()).all() and ((offsets == corners[:, :, None, None]) | hidden).all()
    return corners if is_window and (corners >= 0).all() else None


def _inside(boxes: Tensor, corners: Tensor, size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Parts of boxes, (B, 4): from corners, (B, 2), and of a size in cells, of which a box has a grid."""
    cell = boxes[:, 2:] / torch.tensor(grid, device=boxes.device)
    inner = torch.cat([corners * cell, torch.tensor(size, device=boxes.device) * cell], dim=1).round().long()
    inner[:, :2] += boxes[:, :2]
    return inner


def render(recording: Recording, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """The images as the sub-model sees them, (B, 3, H, W) uint8.

    Removed parts fade to white, replaced ones are sky blue, zeroed ones have the colour that zero is.

    Args:
        recording: from `record`.
        mean: of each channel, as the images were normalised with; None stretches each image over the full range.
        std: likewise.
    """
    images, states = recording.images, recording.states.unsqueeze(1)
    paper, mask_token = (torch.tensor(colour, device=images.device).view(1, 3, 1, 1) for colour in (PAPER, MASK_TOKEN))
    colours = _to_uint8(recording.pixels, images, mean, std)
    ghost = GHOST * _to_uint8(images, images, mean, std) + (1 - GHOST) * paper
    colours = torch.where(states == PixelState.REMOVED, ghost.round().to(torch.uint8), colours)
    return torch.where(states == PixelState.REPLACED, mask_token.to(torch.uint8), colours)


def render_main(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Normalised images (B, C, H, W) as the main model sees them, (B, 3, H, W) uint8; arguments as `render`."""
    return _to_uint8(images, images, mean, std)


def _to_uint8(pixels: Tensor, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Pixels that are normalised as images, (B, C, H, W), as (B, 3, H, W) uint8; but for three channels grey."""
    if mean is None or std is None:
        black, white = (extreme(dim=(1, 2, 3), keepdim=True) for extreme in (images.amin, images.amax))
        pixels = (pixels - black) / (white - black).clamp_min(torch.finfo(images.dtype).tiny)
    else:
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
        pixels = (pixels + mean / std) / (1 / std)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)
