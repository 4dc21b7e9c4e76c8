"""The main model's loss, timm's."""

from __future__ import annotations

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from engine.config import LossConfig


def build_criterion(config: LossConfig, soft_labels: bool) -> nn.Module:
    """The loss; `soft_labels` says that Mixup gives (B, K) targets, already smoothed."""
    if config.name == "bce":
        return BinaryCrossEntropy(smoothing=config.smoothing, target_threshold=config.target_threshold)
    if soft_labels:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()
