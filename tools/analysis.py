"""What a model and its sub-models compute: of a configuration, with or without its data, and of any timm model."""

from __future__ import annotations

import functools
import sys

import augsub
from engine.config import Config
from engine.data import IMAGENET, DataSource
from engine.defaults import build_sub_models, complete, open_source
from engine.errors import InputError, input_errors
from engine.run_model import create_configured_model
from models.build import create_model
from models.complexity import Complexity, analyze

DEFAULT_AUGSUB, DEFAULT_RATIO = "masking", 0.5
Analysis = tuple[Complexity, list[augsub.SubModelAugmentation]]


def analyze_named(name: str, augmentation: str | None, ratio: float | None) -> Analysis:
    """A timm model as timm builds it, and one sub-model."""
    augmentation = DEFAULT_AUGSUB if augmentation is None else augmentation
    ratio = DEFAULT_RATIO if ratio is None else ratio
    with input_errors("--model"):
        model = create_model(name)
    with input_errors(f"--augsub {augmentation} --ratio {ratio} for {name}"):
        augmentations = [augsub.build(augmentation, ratio=ratio)]
        return analyze(model, model.pretrained_cfg["input_size"], augmentations), augmentations


def analyze_configured(config: Config) -> Analysis:
    """The model and the sub-models of a configuration; no data and no weights are needed."""
    config = complete(config)
    source = data_source(config)
    model = create_configured_model(config, source)
    augmentations = [sub_model.augmentation for sub_model in build_sub_models(config)]
    with input_errors(f"augsub.sub_models with model.name = {config.model.name}"):
        return analyze(model, source.image_shape(config.data.image_size), augmentations), augmentations


def data_source(config: Config) -> DataSource:
    """The configuration's data, or images like ImageNet's where it is not there."""
    try:
        return open_source(config)
    except InputError as error:
        _note(f"{error}; taken to have {IMAGENET.num_classes} classes")
        return IMAGENET


@functools.cache
def _note(text: str) -> None:
    """Say something once."""
    print(text, file=sys.stderr)
