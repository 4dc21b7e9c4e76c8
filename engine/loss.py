"""The main model's loss, and Mixup and CutMix, which make its targets: all timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from engine.config import Config, LossConfig
from engine.errors import InputError


def build_criterion(config: LossConfig, soft_labels: bool) -> nn.Module:
    """The loss; `soft_labels` says that Mixup gives (B, K) targets, already smoothed."""
    if config.name == "bce":
        return BinaryCrossEntropy(smoothing=config.smoothing, target_threshold=config.target_threshold)
    if soft_labels:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


class IntegerMixup(Mixup):
    """Mixup after which normalised pixels are whole numbers of 0 to 255 again.

    So they come out of timm's loader, which mixes images before it normalises them.

    Args:
        mean, std: of the normalisation, one number per channel.
        device: where the images are.
        kwargs: timm's.
    """

    BRIGHTEST = 255.0

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = super().__call__(images, labels)
        pixels = ((images * self._std + self._mean) * self.BRIGHTEST).round()
        return (pixels / self.BRIGHTEST - self._mean) / self._std, targets


def build_mixup(config: Config, num_classes: int, micro_batch: int, device: torch.device) -> Mixup | None:
    """What mixes (images (B, C, H, W), labels (B,)) to (images, soft labels (B, K)), or None if it is off.

    Label smoothing moves into the soft labels.

    Raises:
        InputError: an odd micro-batch, whose images cannot be paired.
    """
    mixup = config.mixup
    if mixup.mixup_alpha == 0 and mixup.cutmix_alpha == 0 and mixup.cutmix_minmax is None:
        return None
    if micro_batch % 2:
        raise InputError(
            f"mixup: needs an even number of images per process and micro-batch, not {micro_batch} "
            "(train.global_batch / processes / train.accumulation)"
        )
    names = ("mixup_alpha", "cutmix_alpha", "cutmix_minmax", "prob", "switch_prob", "mode", "correct_lam")
    arguments = {name: getattr(mixup, name) for name in names}
    arguments |= {"label_smoothing": config.loss.smoothing, "num_classes": num_classes}
    if mixup.integer_pixels:
        return IntegerMixup(config.transform.mean, config.transform.std, device, **arguments)
    return Mixup(**arguments)
