"""The loop over held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from engine.distributed import Process
from engine.evaluation.meters import Accuracy, Meter, NonFinite
from engine.precision import Precision

Loader = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    process: Process,
    meters: Sequence[Meter],
    name: str = "the model",
) -> None:
    """Feed meters with all images of all processes.

    Args:
        model: without distributed wrapper; its training mode is restored.
        loader: this process's share of the images, on its device.
        meters: new ones; at the end each has what all processes have counted.
        name: of the model, for a message.

    Raises:
        RunError: a logit of an image that counts is NaN or infinite.
    """
    was_training, non_finite = model.training, NonFinite(process.device)
    meters = [non_finite, *meters]
    model.eval()
    for images, labels in loader:
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        for meter in meters:
            meter.update(logits, labels)
    model.train(was_training)
    for meter in meters:
        meter.reduce(process)
    non_finite.refuse(name)


def evaluate(
    model: nn.Module, loader: Loader, precision: Precision, process: Process, name: str = "the model"
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of images.

    Args:
        model: without distributed wrapper; its training mode is restored.
        loader: this process's share of the images; those labelled IGNORED are not counted.
        name: of the model, for a message.

    Raises:
        InputError: no image is left to count.
        RunError: a logit is NaN or infinite.
    """
    accuracy = Accuracy(process.device)
    measure(model, loader, precision, process, [accuracy], name)
    return accuracy.result()
