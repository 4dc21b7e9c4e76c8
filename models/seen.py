"""What a sub-model sees of its images, as a real forward shows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import augsub
from augsub.registry import AugmentationSpec
from models.recording import (
    Dropping,
    DropRecorder,
    Fate,
    Hidden,
    RecordedAugmentation,
    Recording,
    same_random_numbers,
    spread,
)


@dataclass(frozen=True)
class Seen:
    """One sub-forward.

    Attributes:
        images: what the main model sees, (B, C, H, W).
        inputs: what the sub-model's forward got, (B, C, h, w): smaller after a crop, zero where masked so.
        boxes: which part of the image that is, (B, 4) int64: top, left, height, width in pixels.
        crops: what a random crop left of the image, as `boxes`; differs from it where tokens were cropped.
        hidden: cells that were masked or, as tokens, cropped away.
        paths: calls of stochastic-depth modules, in the order of the forward.
        dropouts: calls of the dropouts after projections and in MLPs, in the order of the forward.
        logits: of the sub-model, (B, K).
    """

    images: Tensor
    inputs: Tensor
    boxes: Tensor
    crops: Tensor
    hidden: tuple[Hidden, ...]
    paths: tuple[Dropping, ...]
    dropouts: tuple[Dropping, ...]
    logits: Tensor

    @cached_property
    def fates(self) -> Tensor:
        """What became of every pixel of the images, (B, H, W) uint8, values of `Fate`."""
        fates = torch.full_like(self.images[:, 0], Fate.REMOVED, dtype=torch.uint8)
        for sample, (top, left, height, width) in enumerate(self.boxes.tolist()):
            inside = fates[sample, top : top + height, left : left + width]
            inside.fill_(Fate.VISIBLE)
            for hidden in self.hidden:
                row, column, *size = hidden.boxes[sample].tolist()
                canvas = torch.zeros_like(fates[sample], dtype=torch.bool)
                canvas[row : row + size[0], column : column + size[1]] = spread(hidden.cells[sample], size)
                inside[canvas[top : top + height, left : left + width]] = hidden.fate
        return fates

    @cached_property
    def pixels(self) -> Tensor:
        """The sub-model's input at its place in the images, around it the images, (B, C, H, W)."""
        pixels = self.images.clone()
        for sample, (top, left, height, width) in enumerate(self.boxes.tolist()):
            shown = F.interpolate(self.inputs[sample : sample + 1], size=(height, width), mode="nearest-exact")
            pixels[sample, :, top : top + height, left : left + width] = shown[0]
        return pixels


@torch.no_grad()
def see(model: nn.Module, images: Tensor, augmentation: AugmentationSpec, seed: int) -> Seen:
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
    recording = Recording.of(images)
    names = {module: name for name, module in model.named_modules()}
    members = [RecordedAugmentation(member, recording) for member in augsub.build(augmentation).members]
    sites = [site for site in recording.droppings if site in augsub.supports(model).values()]
    recorders = [DropRecorder(site, names, recording) for site in sites]
    training = {module: module.training for module in names}
    try:
        model.eval()
        with same_random_numbers(images.device):
            torch.manual_seed(seed)
            logits = model(images, augsub=augsub.Compose([*members, *recorders]))
    finally:
        for recorder in recorders:
            recorder.remove_hooks()
        for module, was_training in training.items():
            module.training = was_training
    return Seen(
        images=images,
        inputs=recording.images,
        boxes=recording.boxes,
        crops=recording.crops,
        hidden=(*recording.hidden, *_removed_tokens(recording)),
        paths=tuple(recording.droppings["drop_path"]),
        dropouts=tuple(recording.droppings["dropout"]),
        logits=logits,
    )


def _removed_tokens(recording: Recording) -> list[Hidden]:
    """Tokens that are gone; of several streams the part of the image that none of them sees."""
    if len(recording.streams) < 2:
        return recording.streams
    first = recording.streams[0]
    unseen = [
        torch.stack([spread(stream.cells[sample], box[2:].tolist()) for stream in recording.streams]).all(dim=0)
        for sample, box in enumerate(first.boxes)
    ]
    return [Hidden(first.fate, torch.stack(unseen), first.boxes)]
