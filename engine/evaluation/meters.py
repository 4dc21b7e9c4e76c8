"""Sums over images from which figures follow: they add up over batches, processes and data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data import IGNORED
from engine.distributed import Process
from engine.errors import InputError, RunError


class Meter(Protocol):
    """Is fed with logits (B, K) in float32 and labels (B,); those labelled IGNORED are not counted."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch, without waiting for the device."""

    def reduce(self, process: Process) -> None:
        """Add up what all processes have counted. They must call it together, once, at the end."""


class SummingMeter(Meter):
    """A meter that keeps nothing but sums.

    Attributes:
        totals: float64, of any shape.
    """

    totals: Tensor

    def reduce(self, process: Process) -> None:
        process.sum(self.totals)


class Accuracy(SummingMeter):
    """Top-1, top-5 and cross-entropy."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss

    def update(self, logits: Tensor, labels: Tensor) -> None:
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        counted = (labels != IGNORED).sum()  # no class has that number, so it is in no ranking either
        self.totals += torch.stack([counted, ranked[:, 0].sum(), ranked.sum(), loss])

    def result(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of images.

        Raises:
            InputError: there are none.
        """
        images, top1, top5, loss = self.totals.tolist()
        if not images:
            raise InputError("evaluation: none of the held-out images can be read")
        return {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "eval_loss": loss / images,
            "images": int(images),
        }


class NonFinite(SummingMeter):
    """Images of which a logit is NaN or infinite: no figure says anything of such a model."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # images, those of them

    def update(self, logits: Tensor, labels: Tensor) -> None:
        counted = labels != IGNORED
        self.totals += torch.stack([counted.sum(), (counted & ~logits.isfinite().all(dim=1)).sum()])

    def refuse(self, name: str) -> None:
        """Raise RunError, in all processes, if there are any; `name` says whose logits they are."""
        images, spoilt = map(int, self.totals.tolist())
        if spoilt:
            raise RunError(f"evaluation: logits of {name} are NaN or infinite for {spoilt} of {images} images")


class Calibration(SummingMeter):
    """Whether confidence, the largest softmax probability, is as high as accuracy (Guo et al., arXiv 1706.04599)."""

    BINS = 15  # of equal width, as in that paper; bin i holds confidences in (i / 15, (i + 1) / 15]

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(3, self.BINS, dtype=torch.float64, device=device)  # images, confidence, correct

    def update(self, logits: Tensor, labels: Tensor) -> None:
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        bins = ((confidence * self.BINS).ceil().long() - 1).clamp(0, self.BINS - 1)
        sums = torch.stack([torch.ones_like(confidence), confidence, predicted == labels]).double()
        self.totals.index_add_(1, bins, sums * (labels != IGNORED))

    @property
    def error(self) -> float:
        """Expected calibration error in percent: the mean gap between confidence and accuracy, bins by their images."""
        images, confidence, correct = self.totals
        return float(100 * (correct - confidence).abs().sum() / images.sum())


class Confusion(SummingMeter):
    """How many images of each class were taken for each class: totals[true, predicted], (K, K)."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.totals = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        counted = labels != IGNORED
        cells = labels.clamp(min=0) * self.totals.shape[1] + logits.argmax(dim=1)
        self.totals.view(-1).index_add_(0, cells, counted.double())

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """Pairs (true, predicted, images) of different classes, most images first; those without images left out."""
        mistakes = self.totals - self.totals.diag().diag()
        images, cells = mistakes.flatten().sort(descending=True, stable=True)
        size = self.totals.shape[1]
        pairs = zip(images[:count].tolist(), cells[:count].tolist(), strict=True)
        return [(*divmod(cell, size), int(number)) for number, cell in pairs if number]


class AcceptedLabels(Meter):
    """Images with several right classes: meters are told the one that the model ranks highest.

    The model is thus right whenever its prediction is among them, and the cross-entropy is the smallest one.

    Args:
        accepted: (N, M) right classes of each of N images, filled up with IGNORED; labels are rows of it.
        meters: of logits and labels.
    """

    def __init__(self, accepted: Tensor, meters: Sequence[Meter]) -> None:
        self._accepted = accepted
        self._meters = meters

    def update(self, logits: Tensor, labels: Tensor) -> None:
        classes = self._accepted[labels.clamp(min=0)]
        scores = logits.gather(1, classes.clamp(min=0)).masked_fill(classes == IGNORED, -torch.inf)
        best = classes.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        best = torch.where(labels == IGNORED, IGNORED, best)
        for meter in self._meters:
            meter.update(logits, best)

    def reduce(self, process: Process) -> None:
        for meter in self._meters:
            meter.reduce(process)
