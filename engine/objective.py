"""The training objective of a configuration: its sub-models, and the models that teach them."""

from __future__ import annotations

import inspect
from pathlib import Path

from torch import nn

import augsub
from engine.checkpoint import load
from engine.config import Config
from engine.data.source import DataSource
from engine.errors import InputError, input_errors
from models.build import create_model
from models.weights import load_weights


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
            load_weights(model, load(Path(settings.checkpoint)), settings.checkpoint).log(settings.checkpoint)
        return augsub.patch(model)
