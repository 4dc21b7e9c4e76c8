"""What a criterion makes of logits and labels, and how the main model's prediction teaches a sub-model.

A sub-model's loss (arXiv 2306.11339, section 3) is least, with gradient zero, where it predicts what its teacher does:
weights, smoothing and thresholds of a criterion are for labels and play no part in it. It is on the scale of the
criterion's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F

Criterion = Callable[[Tensor, Tensor], Tensor]
TargetForm = Literal["softmax", "sigmoid"]
FORMS: tuple[TargetForm, ...] = get_args(TargetForm)
# Classes and functions of torch and timm
KNOWN: dict[str, TargetForm] = {
    **dict.fromkeys(("CrossEntropyLoss", "cross_entropy", "LabelSmoothingCrossEntropy"), "softmax"),
    **dict.fromkeys(("SoftTargetCrossEntropy", "PolyCrossEntropy", "AsymmetricLossSingleLabel"), "softmax"),
    **dict.fromkeys(("BCEWithLogitsLoss", "binary_cross_entropy_with_logits", "BinaryCrossEntropy"), "sigmoid"),
    **dict.fromkeys(("MultiLabelSoftMarginLoss", "multilabel_soft_margin_loss"), "sigmoid"),
    **dict.fromkeys(("PolyBinaryCrossEntropy", "AsymmetricLossMultiLabel"), "sigmoid"),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": Tensor.mean,
    "sum": Tensor.sum,
    "batchmean": lambda losses: losses.sum() / len(losses),  # mean over the batch of sums over the classes
}
SUM_TOLERANCE = 0.01  # of a row of targets: bfloat16 has three decimal digits
MEANS_OVER_CLASSES = ("MultiLabelSoftMarginLoss", "multilabel_soft_margin_loss")  # whatever their reduction of images


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
    try:
        if isinstance(criterion, SoftTargetCrossEntropy) and targets.ndim == 1:
            raise ValueError("it would broadcast them")
        loss = criterion(logits, targets)
    except torch.cuda.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name_of(criterion)} cannot take targets {tuple(targets.shape)}, {targets.dtype}, with logits "
            f"{tuple(logits.shape)}: {' '.join(str(error).split()).rstrip('.')}; labels (B,), below "
            f"{logits.shape[1]}, need nn.CrossEntropyLoss or timm.loss.LabelSmoothingCrossEntropy, soft targets "
            "(B, K), as mixup makes them, timm.loss.SoftTargetCrossEntropy or BinaryCrossEntropy"
        ) from error
    if loss.ndim != 0:
        raise ValueError(
            f"the criterion returned a loss of shape {tuple(loss.shape)}, needed is a scalar: reduction='mean'"
        )
    return loss


@dataclass(frozen=True)
class Teaching:
    """Targets of sub-models, and the loss that measures how far from them they are.

    Attributes:
        form: softmax, one right class per image, or sigmoid, each class a question of its own.
        reduction: how the losses of images (softmax), or of images and classes (sigmoid), become one.
        is_assumed: whether the criterion tells no reduction.
    """

    form: TargetForm
    reduction: str
    is_assumed: bool

    def target(self, logits: Tensor) -> Tensor:
        """Probabilities, float32, of the teacher's logits (B, K), dense (B, K, …), without a gradient."""
        logits = logits.detach().float()
        return logits.softmax(dim=1) if self.form == "softmax" else logits.sigmoid()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, a scalar, of a sub-model's logits (B, K) and the teacher's probabilities (B, K); or dense."""
        logits = logits.float()
        if self.form == "softmax":
            losses = -(target * logits.log_softmax(dim=1)).sum(dim=1)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return REDUCTIONS[self.reduction](losses)

    def divergence(self, logits: Tensor, others: Tensor) -> Tensor:
        """KL(p || q), a scalar, of the predictions p, q of two logits (B, K), or dense; gradients go through both."""
        logits, others = logits.float(), others.float()
        if self.form == "softmax":
            of_one, of_other = logits.log_softmax(dim=1), others.log_softmax(dim=1)
            losses = (of_one.exp() * (of_one - of_other)).sum(dim=1)
        else:  # of each class and of its opposite
            right, wrong = (F.logsigmoid(sign * logits) - F.logsigmoid(sign * others) for sign in (1, -1))
            losses = logits.sigmoid() * right + (-logits).sigmoid() * wrong
        return REDUCTIONS[self.reduction](losses)


def teaching_for(criterion: Criterion, targets: TargetForm | None = None) -> Teaching:
    """How sub-models learn beside a main model that learns by `criterion`.

    Args:
        criterion: loss of (logits, targets). One of torch or timm tells its form, also in a `functools.partial` or
            compiled. An attribute `reduction` is its scale; without one it must be a mean.
        targets: the form, needed for any other criterion.

    Raises:
        ValueError: the form is not known, is none of `FORMS`, or contradicts a criterion whose form is known; or the
            reduction has no counterpart.
    """
    if targets is not None and targets not in FORMS:
        raise ValueError(f"targets = {targets!r}, allowed is {' or '.join(map(repr, FORMS))}")
    bare, arguments = _unwrapped(criterion)
    known = _known_form(bare)
    if known is not None and targets not in (None, known):
        raise ValueError(f"targets = {targets!r}: {name_of(bare)} has {known} targets")
    form = targets or known
    if form is None:
        raise ValueError(
            f"whether {name_of(criterion)} has one right class per image or several is not known: say so by "
            "targets='softmax' (one) or targets='sigmoid' (several) in SubModelObjective"
        )
    reduction = arguments.get("reduction", getattr(criterion, "reduction", getattr(bare, "reduction", None)))
    if getattr(bare, "sum_classes", False):  # timm's BinaryCrossEntropy, whose own reduction is then none
        reduction = "batchmean"
    if reduction not in (None, "none", *REDUCTIONS) or (reduction == "sum" and name_of(bare) in MEANS_OVER_CLASSES):
        raise ValueError(f"{name_of(bare)}: reduction = {reduction!r} has no counterpart for sub-models, use 'mean'")
    # with none the criterion gives no scalar, which is refused where it is called
    return Teaching(form, "mean" if reduction in (None, "none") else reduction, is_assumed=reduction is None)


def check_first_batch(teaching: Teaching, criterion: Criterion, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
    """Look at the values of a batch: whether targets have the form, and whether an assumed scale is right.

    Args:
        teaching: what the sub-models learn by.
        criterion: the main model's.
        logits: of the main model, (B, K).
        targets: labels (B,) or (B, K).
        loss: the criterion's, of these.

    Raises:
        ValueError: rows of `targets` (B, K) are no distributions under softmax, or the criterion adds up what the
            sub-models' loss averages.
    """
    if teaching.form == "softmax" and targets.ndim == 2 and targets.is_floating_point():
        sums = targets.float().sum(dim=1)
        row = int((sums - 1).abs().argmax())
        if not abs(float(sums[row]) - 1) < SUM_TOLERANCE or float(targets.min()) < 0:
            raise ValueError(
                f"targets {tuple(targets.shape)} of {name_of(criterion)} must be distributions, row {row} has the sum "
                f"{float(sums[row]):g}; several labels per image need a binary cross-entropy, or targets='sigmoid'"
            )
    if not teaching.is_assumed:
        return
    axes = {"images": 0, "classes": 1} if teaching.form == "sigmoid" else {"images": 0}
    for name, axis in axes.items():
        if _adds_up(axis, criterion, logits.detach(), targets, loss):
            raise ValueError(
                f"{name_of(criterion)} adds up over the {name}, of which sub-models learn by the mean: return a mean, "
                "or give it an attribute reduction = 'sum' (over all) or 'batchmean' (over the classes alone)"
            )


@torch.no_grad()
def _adds_up(axis: int, criterion: Criterion, logits: Tensor, targets: Tensor, loss: Tensor) -> bool:
    """Whether everything twice along an axis has about twice the loss."""
    if targets.ndim <= axis:
        return False
    try:
        twice = criterion(torch.cat([logits] * 2, axis), torch.cat([targets] * 2, axis))
    except (IndexError, RuntimeError, TypeError, ValueError):  # it has weights for just these classes
        return False
    return abs(float(twice)) > 1.5 * abs(float(loss))


def _unwrapped(criterion: Any) -> tuple[Any, dict[str, Any]]:
    """The criterion inside of partials and of torch.compile, and the keyword arguments of the partials."""
    arguments: dict[str, Any] = {}
    while True:
        if isinstance(criterion, partial):
            arguments = {**criterion.keywords, **arguments}
            criterion = criterion.func
        elif hasattr(criterion, "_orig_mod"):
            criterion = criterion._orig_mod
        elif hasattr(criterion, "_torchdynamo_orig_callable"):
            criterion = criterion._torchdynamo_orig_callable
        else:
            return criterion, arguments


def _known_form(criterion: Any) -> TargetForm | None:
    for one in type(criterion).__mro__ if isinstance(criterion, torch.nn.Module) else [criterion]:
        if str(getattr(one, "__module__", "")).partition(".")[0] in ("torch", "timm") and one.__name__ in KNOWN:
            return KNOWN[one.__name__]
    return None


def name_of(criterion: Criterion) -> str:
    """The criterion in a message."""
    return getattr(criterion, "__name__", type(criterion).__name__)
