"""What a model costs: parameters, FLOPs of main model and sub-models, activations, cost of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import augsub
from models.build import check_image_shape
from models.flop_counting import ForwardCost, count_forward, count_parameters


@dataclass(frozen=True)
class Complexity:
    """Cost of one model for one image.

    Attributes:
        params: parameters of the model, without what `augsub.patch` adds.
        params_by_module: the same by name of the module; "" is the whole model.
        main: the main model's forward.
        subs: the forward of each sub-model.
    """

    params: int
    params_by_module: dict[str, int]
    main: ForwardCost
    subs: tuple[ForwardCost, ...]

    @property
    def sub_flops(self) -> int:
        """Multiply-adds of all sub-models together."""
        return sum(sub.flops for sub in self.subs)

    @property
    def training_cost(self) -> float:
        """FLOPs of a training step relative to plain training: (main + sum of subs) / main."""
        return (self.main.flops + self.sub_flops) / self.main.flops

    @property
    def uncounted(self) -> dict[str, int]:
        """Ops of any of these forwards that have no FLOP handler, with the number of their calls."""
        forwards = (self.main, *self.subs)
        names = sorted({name for forward in forwards for name in forward.uncounted})
        return {name: sum(forward.uncounted.get(name, 0) for forward in forwards) for name in names}

    def as_dict(self) -> dict[str, float]:
        """The figures as plain numbers."""
        return {
            "params": self.params,
            "main_flops": self.main.flops,
            "sub_flops": self.sub_flops,
            "training_cost": self.training_cost,
            "activations": self.main.activations,
        }


def analyze(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    augmentations: Sequence[augsub.SubModelAugmentation] = (),
) -> Complexity:
    """Count one forward of the main model and of each sub-model, all in evaluation mode.

    Args:
        model: a model that is not patched; it is put into evaluation mode.
        image_shape: (C, H, W).
        augmentations: one for each sub-model.

    Raises:
        ValueError: if an augmentation has no site in the model, or images of that shape do not fit.
    """
    images = torch.zeros(1, *image_shape)
    params_by_module = count_parameters(model.eval())
    augsub.patch(model)
    try:
        check_image_shape(model, image_shape, augmentations)
        main = count_forward(model, images)
        subs = tuple(count_forward(model, images, augmentation) for augmentation in augmentations)
    finally:
        augsub.unpatch(model)
    return Complexity(params_by_module[""], params_by_module, main, subs)
