"""Dropout: the sub-model drops activations after attention projections and in MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from augsub.augmentation import SubModelAugmentation
from augsub.registry import register


@register("dropout")
class Dropout(SubModelAugmentation):
    """Projection and MLP dropouts have probability `ratio`, whatever the main model's rate."""

    sites = ("dropout",)

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        return {"p": self.ratio, "training": True}  # in evaluation mode too: a sub-model is one wherever it runs
