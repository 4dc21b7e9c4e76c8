"""How good a model's features are by themselves: classifiers of scikit-learn on what comes before its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from engine.config import Config
from engine.data.images import IGNORED, Images
from engine.data.loaders import BadFiles, Batches
from engine.data.source import DataSource
from engine.data.transforms import build_transform
from engine.distributed import Process
from engine.errors import InputError
from engine.precision import Precision

NEIGHBOURS = 20  # as DINO has it, arXiv 2104.14294
PROBES: dict[str, Callable[[], Any]] = {
    "knn": lambda: KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
    "linear": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
}


def chosen_probes(text: str | None) -> list[str]:
    """The names in a text like "knn,linear"; InputError for an unknown one."""
    names = text.split(",") if text else []
    for name in names:
        if name not in PROBES:
            raise InputError(f"--features {text}: allowed are {', '.join(PROBES)}")
    return names


def probe(
    names: Sequence[str],
    model: nn.Module,
    config: Config,
    source: DataSource,
    process: Process,
    precision: Precision,
    bad_files: BadFiles,
) -> dict[str, float]:
    """Top-1 accuracy in percent of each probe that is fitted to the training images, on the held-out ones.

    Both are seen as in evaluation. All processes must call it together; the main process fits.

    Args:
        names: of `PROBES`.
        model: a timm model, patched or not.
        source: with training images.

    Raises:
        InputError: fewer training images than a probe needs.
    """
    train = source.train
    if isinstance(train, Images):
        evaluation = build_transform(config, is_training=False)
        train = train.seen_through(lambda _: evaluation)
    (known, answers), (asked, right) = (
        features(model, Batches(config, replace(source, held_out=images), process, bad_files), precision, process)
        for images in (train, source.held_out)
    )
    found: dict[str, float] = {}
    if process.is_main:
        if len(known) < NEIGHBOURS:
            raise InputError(f"--features: {len(known)} training images, needed are {NEIGHBOURS}")
        found = {name: 100 * float(PROBES[name]().fit(known, answers).score(asked, right)) for name in names}
    return found


@torch.inference_mode()
def features(
    model: nn.Module, batches: Batches, precision: Precision, process: Process
) -> tuple[np.ndarray, np.ndarray]:
    """What the model gives before its classifier, (N, D) float32, and labels (N,), of all processes' images."""
    model.eval()
    values, labels = [], []
    for images, targets in batches:
        with precision.autocast():
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        counted = targets != IGNORED
        values.append(pooled.flatten(1).float()[counted].cpu())
        labels.append(targets[counted].cpu())
    shares = process.gather((torch.cat(values).numpy(), torch.cat(labels).numpy()))
    return tuple(np.concatenate(parts) for parts in zip(*shares, strict=True))
