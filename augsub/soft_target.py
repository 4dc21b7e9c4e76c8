"""Soft targets: how the main model's prediction teaches a sub-model (arXiv 2306.11339, section 3)."""

from __future__ import annotations

import copy

from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from augsub.main_loss import Criterion


def is_binary_cross_entropy(criterion: Criterion) -> bool:
    """Whether the criterion sees each class as a yes-or-no question of its own."""
    return isinstance(criterion, (nn.BCEWithLogitsLoss, BinaryCrossEntropy)) or (
        criterion is F.binary_cross_entropy_with_logits
    )


def soft_target(logits: Tensor, criterion: Criterion) -> Tensor:
    """Probabilities (B, K), float32, that sub-models learn from: sigmoid under a BCE, else softmax."""
    logits = logits.float()
    return logits.sigmoid() if is_binary_cross_entropy(criterion) else logits.softmax(dim=-1)


def sub_criterion(criterion: Criterion) -> Criterion:
    """The loss of a sub-model that fits `criterion`, for targets from :func:`soft_target`.

    A BCE stays itself, without a target threshold: the teaching prediction is not binarised. Any
    other loss becomes the cross-entropy for soft targets.
    """
    if not is_binary_cross_entropy(criterion):
        return soft_target_cross_entropy
    if isinstance(criterion, BinaryCrossEntropy):
        criterion = copy.copy(criterion)
        criterion.target_threshold = None
        criterion.smoothing = 0.0
    return criterion


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of the cross-entropy between (B, K) target probabilities and logits."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
