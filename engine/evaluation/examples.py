"""Pictures of a few held-out images: what main model and sub-models see of them, and which are taken for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

import augsub
from engine.config import Config
from engine.data.loaders import Batches
from engine.data.transforms import normalisation
from engine.evaluation.metrics import Metrics
from models.pictures import record, render, render_main

SHOWN = 8  # images of whatever is shown
PAIRS = 6  # of classes, those that are confused most


def draw_seen(
    model: nn.Module,
    images: Tensor,
    augmentations: Mapping[str, augsub.SubModelAugmentation | None],
    config: Config,
    is_compiled: bool,
) -> dict[str, Tensor]:
    """Images (B, C, H, W) as sub-models see them, and the main model (None), (B, 3, H, W) uint8, by the same titles."""
    mean, std = normalisation(config)
    pictures = {}
    # nothing is compiled for it
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        for title, augmentation in augmentations.items():
            if augmentation is None:
                pictures[title] = render_main(images, mean, std)
            else:
                pictures[title] = render(record(model, images, augmentation, config.seed), mean, std)
    return pictures


def draw_mistakes(metrics: Metrics, held_out: Batches, class_names: Sequence[str], config: Config) -> dict[str, Tensor]:
    """Some images of the most confused pairs of classes, (B, 3, H, W) uint8, by title.

    Args:
        metrics: of all `held_out` images.
    """
    pictures = {}
    for true, predicted, count in metrics.most_confused(PAIRS):
        numbers = np.flatnonzero(([true, predicted] == metrics.outcomes.T).all(axis=1))[:SHOWN]
        title = f"{class_names[true]}, taken for {class_names[predicted]}: {count} images"
        pictures[title] = render_main(held_out.images(numbers.tolist()), *normalisation(config))
    return pictures
