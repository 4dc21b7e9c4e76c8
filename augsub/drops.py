"""Drop path and dropout: the sub-model drops at its own rate, in evaluation mode too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from augsub.augmentation import SubModelAugmentation
from augsub.registry import register
from augsub.residual_branches import rate_name

MODES = ("compute", "skip")


@register("drop_path")
class DropPath(SubModelAugmentation):
    """Every residual branch is dropped per sample with probability `ratio`, whatever the main model's rate.

    Stochastic depth (arXiv 1603.09382).

    Args:
        ratio: share of the images whose branch is dropped, in [0, 1).
        mode: ``compute``: computed for all images and dropped, as timm does; ``skip``: computed for exactly
            int(B * (1 - ratio)) of B images, at least one, which saves the others' work. The mean is the same.

    Raises:
        ValueError: for an argument out of range and, in the sub-forward, where the branches of a model cannot be
            computed apart from its other images.
    """

    sites = ("drop_path",)

    def __init__(self, ratio: float, mode: str = "compute") -> None:
        super().__init__(ratio)
        if mode not in MODES:
            raise ValueError(f"drop_path: mode = {mode!r}, allowed are {' and '.join(MODES)}")
        self.mode = mode

    @property
    def skips_paths(self) -> bool:
        return self.mode == "skip"

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        return {rate_name(module): self.ratio, "training": True}


@register("dropout")
class Dropout(SubModelAugmentation):
    """Dropouts after attention projections and in MLPs have probability `ratio`, whatever the main model's rate."""

    sites = ("dropout",)

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        return {"p": self.ratio, "training": True}
