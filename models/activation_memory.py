"""Memory of what a forward keeps for its backward, measured with a few images and scaled to many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import augsub

FEW, MORE = 2, 3  # images; BatchNorm refuses one


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that autograd holds at the end of a forward, beside parameters and buffers.

    Attributes:
        per_image: activations, the image itself included.
        fixed: the same for any batch, above all the weights that autocast has converted.
    """

    per_image: int
    fixed: int

    def of(self, images: int) -> int:
        """Bytes for that many images at once."""
        return self.fixed + images * self.per_image


def activation_memory(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    augmentation: augsub.SubModelAugmentation | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> ActivationMemory:
    """Two forwards in training mode, where the model is and with the kernels that run there.

    What backward itself needs for a while is not in it, nor the block that `train.grad_checkpointing` computes again.

    Args:
        model: a patched model; its BatchNorm statistics and random state go on.
        image_shape: (C, H, W).
        augmentation: of a sub-model; None for the main model.
        autocast: makes the context of a forward.
    """
    few, more = (_kept_bytes(model.train(), image_shape, count, augmentation, autocast) for count in (FEW, MORE))
    per_image = (more - few) // (MORE - FEW)
    return ActivationMemory(per_image, fixed=few - FEW * per_image)


def _kept_bytes(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    count: int,
    augmentation: augsub.SubModelAugmentation | None,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Bytes of the images and of all storages that tensors saved for backward lie in, each counted once."""
    images = torch.randn(count, *image_shape, device=next(model.parameters()).device)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {images.untyped_storage().data_ptr(): images.nbytes}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with autocast(), saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(images, augsub=augmentation)
    del output  # until here nothing of the graph is freed, so that no address was used twice
    return sum(kept.values())
