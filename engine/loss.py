"""What is minimised: the main model's loss; Mixup and CutMix, which make its targets; and the objective of it all.

The losses and the mixing are timm's. The objective has the sub-models, and the models that teach them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import augsub
from augsub.named_registry import did_you_mean
from engine.checkpoint import class_names_in, load
from engine.config import Config, LossConfig
from engine.data.source import DataSource, check_classes, check_pretrained_classes
from engine.data.transforms import normalisation
from engine.errors import InputError, input_errors
from models.build import create_model
from models.weights import load_weights


def build_criterion(config: LossConfig, soft_labels: bool, weights: Tensor | None = None) -> nn.Module:
    """The loss.

    Args:
        config: what it is.
        soft_labels: whether Mixup gives (B, K) targets, already smoothed.
        weights: of the classes, (K,); None: all 1.
    """
    if config.name == "bce":
        return BinaryCrossEntropy(config.smoothing, config.target_threshold, weight=weights)
    if weights is not None:
        return WeightedCrossEntropy(weights, label_smoothing=0.0 if soft_labels else config.smoothing)
    if soft_labels:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Each image counts by the weight of its class, in parts of the number of images.

    torch's own mean divides by the weights of the images at hand: the fewer they are at once, the less weights do.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(
            logits, targets, self.weight, reduction="none", label_smoothing=self.label_smoothing
        )
        return losses.mean()


def class_weights(config: LossConfig, source: DataSource) -> Tensor | None:
    """The weights (K,) of `loss.class_weights`, None if all are 1; of `balanced` N / (K n) for n of N images.

    Raises:
        InputError: no such class, a weight that is no positive number, or a class without images to balance.
    """
    given = config.class_weights
    if given is None:
        return None
    names = source.class_names
    if given == "balanced":
        labels = source.train_labels
        counts = labels.sum(axis=0) if labels.ndim > 1 else np.bincount(labels, minlength=source.num_classes)
        if not counts.all():
            raise InputError(f"loss.class_weights = balanced: class {names[counts.argmin()]} has no training image")
        return torch.from_numpy(counts.sum() / (len(counts) * counts)).float()
    if not isinstance(given, Mapping):
        raise InputError(f"loss.class_weights = {given}: allowed is balanced, or a mapping of classes to weights")
    weights = torch.ones(source.num_classes)
    for name, weight in given.items():
        if str(name) not in names:
            raise InputError(f"loss.class_weights: {name} is none of the classes{did_you_mean(str(name), names)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise InputError(f"loss.class_weights: {name} = {weight}: allowed is a number above 0")
        weights[names.index(str(name))] = weight
    return weights


class MultiLabelMixup(Mixup):
    """timm's, which mixes targets (B, K) of several labels as it mixes images, whatever its version.

    For those its arguments are `num_classes` = B and no smoothing.
    """

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if targets.ndim == 1:
            return super().__call__(images, targets)
        images, shares = super().__call__(images, torch.arange(len(images), device=images.device))
        return images, shares @ targets  # (B, B) of each image in each mixture


class IntegerMixup(MultiLabelMixup):
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

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = super().__call__(images, targets)
        pixels = ((images * self._std + self._mean) * self.BRIGHTEST).round()
        return (pixels / self.BRIGHTEST - self._mean) / self._std, targets


def build_mixup(config: Config, source: DataSource, micro_batch: int, device: torch.device) -> Mixup | None:
    """What mixes (images (B, C, H, W), labels (B,) or (B, K)) to (images, soft labels (B, K)), or None if it is off.

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
    classes = micro_batch if source.has_several_labels else source.num_classes
    arguments |= {"label_smoothing": config.loss.smoothing, "num_classes": classes}
    if mixup.integer_pixels:
        return IntegerMixup(*normalisation(config), device, **arguments)
    return MultiLabelMixup(**arguments)


def build_objective(config: Config, criterion: nn.Module) -> augsub.Objective:
    """The training objective of the configuration, without the models that teach."""
    section = config.augsub
    sub_models = build_sub_models(config)
    with input_errors("augsub.objective"):
        kind = augsub.OBJECTIVES.get(section.objective)
    teachers = {"ema": ("ema.enabled", config.ema.enabled), "teacher": ("augsub.teacher.name", section.teacher.name)}
    for number, sub_model in enumerate(sub_models):
        with input_errors(f"augsub.sub_models[{number}].learn_from"):
            needed = augsub.LESSONS.get(sub_model.learn_from).needs_model
        key, is_there = teachers.get(needed, ("", True))
        if not is_there:
            raise InputError(f"augsub.sub_models[{number}].learn_from = {sub_model.learn_from}: needs {key}")
    options = {"main_weight": section.main_weight, "alpha": section.alpha}
    taken = {name: value for name, value in options.items() if name in inspect.signature(kind).parameters}
    with input_errors(f"augsub.objective = {section.objective}"):
        return kind(criterion, sub_models, **taken)


def build_sub_models(config: Config) -> list[augsub.SubModel]:
    """The sub-models of the configuration."""
    with input_errors("augsub.sub_models"):
        return [
            augsub.SubModel(sub.augmentations, weight=sub.weight, share=sub.share, learn_from=sub.learn_from)
            for sub in config.augsub.sub_models
        ]


def build_teacher(config: Config, source: DataSource, has_weights: bool = True) -> nn.Module | None:
    """The model of `augsub.teacher`, patched, so that it can see what a sub-model sees."""
    settings = config.augsub.teacher
    if settings.name is None:
        return None
    with input_errors("augsub.teacher"):
        model = create_model(
            settings.name,
            num_classes=source.num_classes,
            in_chans=source.in_chans,
            image_size=config.data.image_size,
            pretrained=has_weights and settings.checkpoint is None,
            **settings.kwargs,
        )
        if has_weights and settings.checkpoint is not None:
            weights = load(Path(settings.checkpoint))
            load_weights(model, weights, settings.checkpoint, complete=True).log(settings.checkpoint)
            place = f"augsub.teacher.checkpoint = {settings.checkpoint}"
            check_classes(config, source.class_names, class_names_in(settings.checkpoint), place)
        elif has_weights:
            known = model.pretrained_cfg.get("num_classes", source.num_classes)
            if known != source.num_classes:
                raise InputError(
                    f"augsub.teacher.name = {settings.name}: is pretrained for {known} classes, the data have "
                    f"{source.num_classes}: fine-tune it, and set augsub.teacher.checkpoint"
                )
            check_pretrained_classes(config, source.class_names, model, f"augsub.teacher.name = {settings.name}")
        return augsub.patch(model)
