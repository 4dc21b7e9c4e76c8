"""Accuracy on held-out images, each counted exactly once whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data import IGNORED
from engine.distributed import Process
from engine.errors import InputError
from engine.precision import Precision


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision, process: Process
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of images.

    Args:
        model: without distributed wrapper; its training mode is restored.
        loader: this process's share of the images; those labelled IGNORED are not counted.

    Raises:
        InputError: no image is left to count.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=process.device)  # images, top-1, top-5, loss
    for images, labels in loader:
        images, labels = images.to(process.device, non_blocking=True), labels.to(process.device, non_blocking=True)
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        counted = (labels != IGNORED).sum()  # no class has that number, so it is in no ranking either
        totals += torch.stack([counted, ranked[:, 0].sum(), ranked.sum(), loss])
    model.train(was_training)
    images_seen, top1, top5, loss = process.sum(totals).tolist()
    if not images_seen:
        raise InputError("evaluation: none of the held-out images can be read")
    return {
        "top1": 100 * top1 / images_seen,
        "top5": 100 * top5 / images_seen,
        "eval_loss": loss / images_seen,
        "images": int(images_seen),
    }
