"""Drop path and dropout: the sub-model drops at its own rate, in evaluation mode too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from augsub.augmentation import SubModelAugmentation
from augsub.registry import register


@register("drop_path", "droppath")
class DropPath(SubModelAugmentation):
    """Every residual branch is dropped per sample with probability `ratio`, whatever the main model's rate.

    Stochastic depth (arXiv 1603.09382).
    """

    sites = ("drop_path",)

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        # timm's DropPath has `drop_prob`, the residual connections of EfficientViT (MSRA) have `drop`
        return {"drop_prob" if hasattr(module, "drop_prob") else "drop": self.ratio, "training": True}


@register("dropout")
class Dropout(SubModelAugmentation):
    """Dropouts after attention projections and in MLPs have probability `ratio`, whatever the main model's rate."""

    sites = ("dropout",)

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        return {"p": self.ratio, "training": True}
