"""The main model's loss, and Mixup or CutMix, which decides what targets that loss gets."""

from __future__ import annotations

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from engine.config import LossConfig, MixupConfig
from engine.errors import InputError


def build_mixup(config: MixupConfig, smoothing: float, num_classes: int, micro_batch: int) -> Mixup | None:
    """timm's Mixup, or None if it is off. Label smoothing moves into its soft labels."""
    if config.mixup_alpha == 0 and config.cutmix_alpha == 0:
        return None
    if micro_batch % 2:
        raise InputError(
            f"mixup: needs an even number of images per process and micro-batch, not {micro_batch} "
            "(train.global_batch / processes / train.accumulation)"
        )
    return Mixup(
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        prob=config.prob,
        switch_prob=config.switch_prob,
        mode=config.mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def build_criterion(config: LossConfig, soft_labels: bool) -> nn.Module:
    """The loss; `soft_labels` says that Mixup gives (B, K) targets, already smoothed."""
    if config.name == "bce":
        return BinaryCrossEntropy(smoothing=config.smoothing, target_threshold=config.target_threshold)
    if soft_labels:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()
