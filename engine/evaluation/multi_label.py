"""What a model is worth on images with several labels, or none: figures of scikit-learn's on all scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from torch import Tensor
from torch.nn import functional as F

from engine.data.images import IGNORED
from engine.distributed import Process
from engine.errors import InputError

THRESHOLD = 0.5  # of a class's probability, above which it is predicted, where none was chosen


class MultiLabelMetrics:
    """Probabilities and targets of images that may have several labels; each class is a question of its own.

    Attributes:
        totals: images, those of them with a logit that is NaN or infinite, binary cross-entropy.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        self._probabilities: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Keep a batch.

        Args:
            logits: (B, K) in float32.
            targets: (B, K) of 0 and 1; rows of IGNORED are not counted.
        """
        counted = (targets != IGNORED).all(dim=1)
        logits, targets = logits[counted], targets[counted]
        spoilt = ~logits.isfinite().all(dim=1)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).sum()
        self.totals += torch.stack([counted.sum(), spoilt.sum(), loss])
        self._probabilities.append(logits.sigmoid().cpu())
        self._targets.append(targets.bool().cpu())

    def reduce(self, process: Process) -> None:
        """Bring together what all processes have seen. They must call it together, once, at the end."""
        process.sum(self.totals)
        shares = process.gather((torch.cat(self._probabilities), torch.cat(self._targets)))
        self._probabilities, self._targets = ([*part] for part in zip(*shares, strict=True))

    def add(self, other: MultiLabelMetrics) -> None:
        """Take over what was seen on other images."""
        self.totals += other.totals
        self._probabilities += other._probabilities
        self._targets += other._targets

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of all images, (N, K) float32."""
        return torch.cat(self._probabilities).numpy()

    @cached_property
    def targets(self) -> np.ndarray:
        """Of all images, (N, K) bool."""
        return torch.cat(self._targets).numpy()

    def figures(self) -> dict[str, float]:
        """In percent `map`, the mean over classes of the average precision, `f1_macro` and `f1_micro`; the mean binary
        cross-entropy `eval_loss`, the number of `images`.

        The mean over classes is over those of which there are images.

        Raises:
            InputError: there are no images, or none has a label.
        """
        images, _, loss = self.totals.tolist()
        if not images:
            raise InputError("evaluation: none of the held-out images can be read")
        there = self.targets.any(axis=0)
        if not there.any():
            raise InputError("evaluation: none of the held-out images has a label")
        own, predicted = self.targets[:, there], self.probabilities[:, there] > THRESHOLD
        return {
            "map": 100 * float(average_precision_score(own, self.probabilities[:, there], average="macro")),
            "f1_macro": 100 * _f1_macro(own, predicted),
            "f1_micro": 100 * float(f1_score(self.targets, self.probabilities > THRESHOLD, average="micro")),
            "eval_loss": loss / images,
            "images": int(images),
        }

    def of_classes(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each class its `images`, `ap` and `f1` in percent, the `threshold` that is best here, and `f1` with it."""
        rows = []
        for name, own, scores in zip(names, self.targets.T, self.probabilities.T, strict=True):
            row: dict[str, Any] = {"class": name, "images": int(own.sum())}
            row |= dict.fromkeys(("ap", "f1", "threshold", "best_f1"))
            if own.any():
                threshold, best = best_threshold(own, scores)
                row["ap"] = round(100 * float(average_precision_score(own, scores)), 3)
                row["f1"] = round(100 * float(f1_score(own, scores > THRESHOLD, zero_division=0)), 3)
                row |= {"threshold": threshold, "best_f1": round(100 * best, 3)}
            rows.append(row)
        return rows

    def details(self, names: Sequence[str]) -> dict[str, Any]:
        """What results.json has beside the figures."""
        return {"thresholds": {row["class"]: row["threshold"] for row in self.of_classes(names)}}


def _f1_macro(targets: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of F1, of (N, K) bool; scikit-learn's own takes a single column for two classes."""
    columns = zip(targets.T, predicted.T, strict=True)
    return float(np.mean([f1_score(own, found, zero_division=0) for own, found in columns]))


def best_threshold(targets: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The smallest score from which on a class is predicted with the largest F1, and this F1.

    Args:
        targets: (N,) bool, at least one of them true.
        scores: (N,).
    """
    precision, recall, thresholds = precision_recall_curve(targets, scores)
    values = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(values[:-1].argmax())
    return float(thresholds[best]), float(values[best])
