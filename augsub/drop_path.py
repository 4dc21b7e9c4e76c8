"""Drop path: the sub-model drops residual branches at its own rate (stochastic depth, arXiv 1603.09382)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from augsub.augmentation import SubModelAugmentation
from augsub.registry import register


@register("drop_path", "droppath")
class DropPath(SubModelAugmentation):
    """Every residual branch is dropped per sample with probability `ratio`, whatever the main model's rate."""

    sites = ("drop_path",)

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        # In evaluation mode too: a sub-model is one wherever it runs. timm's DropPath has `drop_prob`, the residual
        # connections of EfficientViT (MSRA) have `drop`.
        return {"drop_prob" if hasattr(module, "drop_prob") else "drop": self.ratio, "training": True}
