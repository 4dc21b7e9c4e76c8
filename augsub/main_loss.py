"""The main model's loss: what the user's criterion makes of logits and targets, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


def main_loss(criterion: Criterion, logits: Tensor, targets: Tensor) -> Tensor:
    """The criterion's loss, a scalar.

    Args:
        criterion: loss of (logits, targets).
        logits: (B, K).
        targets: labels (B,) or soft labels (B, K).

    Raises:
        ValueError: if the criterion cannot take these targets, or returns no scalar.
    """
    if targets.ndim == 1 and not targets.is_floating_point():
        targets = targets.long()  # torch takes class numbers of no other type
    if isinstance(criterion, SoftTargetCrossEntropy) and targets.ndim == 1:
        raise ValueError(_refusal(criterion, logits, targets, "it would broadcast them"))
    try:
        loss = criterion(logits, targets)
    except torch.cuda.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_refusal(criterion, logits, targets, " ".join(str(error).split()))) from error
    if loss.ndim != 0:
        raise ValueError(
            f"the criterion returned a loss of shape {tuple(loss.shape)}, needed is a scalar: reduction='mean'"
        )
    return loss


def name_of(criterion: Criterion) -> str:
    """The criterion in a message."""
    return getattr(criterion, "__name__", type(criterion).__name__)


def _refusal(criterion: Criterion, logits: Tensor, targets: Tensor, reason: str) -> str:
    if "out of bounds" in reason:
        remedy = f"labels must be in [0, {logits.shape[-1]}), the model's classes"
    elif targets.ndim == 1 and targets.is_floating_point():
        remedy = "labels (B,) must be whole numbers"
    elif targets.ndim == 1:
        remedy = "labels (B,) need nn.CrossEntropyLoss or timm.loss.LabelSmoothingCrossEntropy"
    else:
        remedy = "soft targets (B, K), as mixup makes them, need timm.loss.SoftTargetCrossEntropy or BinaryCrossEntropy"
    return (
        f"{name_of(criterion)} cannot take targets {tuple(targets.shape)}, {targets.dtype}, "
        f"with logits {tuple(logits.shape)}: {reason.rstrip('.')}; {remedy}"
    )
