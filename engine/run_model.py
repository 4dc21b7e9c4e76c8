"""The model of a run, from a configuration: created, patched, with the weights to start from or to evaluate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

import augsub
from engine.checkpoint import load
from engine.config import MODELS_TRANSFORM, Config
from engine.data.rules import check_classes
from engine.data.source import DataSource
from engine.distributed import Process, synchronise_batchnorm
from engine.errors import InputError, input_errors
from models.build import checkpoint_gradients, create_model, image_settings
from models.initialise import freeze, make_drop_path_uniform, restart, start_class_token, start_head
from models.weights import head_tensors, load_weights

LOGGER = logging.getLogger("engine")
IF_AVAILABLE = "if_available"  # value of model.pretrained


def fill_in_from_model(config: Config) -> None:
    """What the configuration leaves to the model: image size, normalisation, evaluation crop."""
    transform = config.transform
    left_open = [key for key in MODELS_TRANSFORM if getattr(transform, key) is None]
    if config.data.image_size is not None and not left_open:
        return
    with input_errors("model.name"):
        image_size, listed = image_settings(config.model.name)
    config.data.image_size = config.data.image_size or image_size
    missing = [f"transform.{key}" for key in left_open if key not in listed]
    if config.data.image_size is None:
        missing.append("data.image_size")
    if missing:
        raise InputError(f"model.name = {config.model.name}: timm lists no {', '.join(missing)} for it, set them")
    for key in left_open:
        setattr(transform, key, listed[key])


def has_pretrained_weights(config: Config) -> bool:
    """Whether timm's weights for the model can be had here; a warning says why not."""
    if config.model.checkpoint is not None:
        return False
    try:
        create_model(config.model.name, pretrained=True)
    except ValueError as error:
        LOGGER.warning("WARNING: the model starts at random, model.pretrained is only %s: %s", IF_AVAILABLE, error)
        return False
    return True


def build_run_model(config: Config, source: DataSource, process: Process, is_resumed: bool = False) -> nn.Module:
    """The model of the configuration, patched, with the weights it starts from unless a checkpoint brings all."""
    settings = config.model
    pretrained = settings.pretrained and settings.checkpoint is None and not is_resumed
    model = create_configured_model(config, source, pretrained)
    if config.distributed.sync_batchnorm:
        model = synchronise_batchnorm(model, process)
    augsub.patch(model)
    with input_errors("model"):
        if not is_resumed:
            start_weights(config, model, source)
        freeze(model, settings.frozen)
    if config.train.grad_checkpointing:
        with input_errors(f"train.grad_checkpointing with model.name = {settings.name}"):
            checkpoint_gradients(model)
    return model


def start_weights(config: Config, model: nn.Module, source: DataSource) -> None:
    """Load `model.checkpoint`, and initialise anew what is to start anew.

    Raises:
        InputError: a head that is kept is for other classes than the data have.
    """
    settings = config.model
    head, restarted = head_tensors(model), tuple(f"{name}." for name in settings.restart)
    keeps_head = settings.head_std is None and not any(tensor.startswith(restarted) for tensor in head)
    if settings.checkpoint is not None:
        content = load(Path(settings.checkpoint))
        report = load_weights(model, content, settings.checkpoint, settings.pos_embed_antialias)
        report.log(settings.checkpoint)
        if keeps_head and head <= set(report.loaded):
            start = f"model.checkpoint = {settings.checkpoint}, whose head is kept,"
            check_classes(config, source.class_names, content.get("class_names"), start)
    elif settings.pretrained and keeps_head:
        check_pretrained_classes(config, source.class_names, model)
    restart(model, settings.restart)
    if settings.head_std is not None:
        start_head(model, settings.head_std, settings.head_bias_bound)
    if settings.class_token_std is not None:
        start_class_token(model, settings.class_token_std)


def check_pretrained_classes(config: Config, class_names: Sequence[str], model: nn.Module) -> None:
    """Compare the classes with those of timm's pretrained head, if it knows their names and there are as many.

    Raises:
        InputError: they differ.
    """
    own = getattr(model, "pretrained_cfg", {})
    if own.get("num_classes") == len(class_names):
        check_classes(config, class_names, own.get("label_names"), f"model.name = {config.model.name}")


def create_configured_model(config: Config, source: DataSource, pretrained: bool = False) -> nn.Module:
    """The timm model of the configuration for this data."""
    settings = config.model
    optional = {"drop_path_rate": settings.drop_path_rate, "drop_rate": settings.drop_rate}
    arguments = {
        "num_classes": source.num_classes,
        "in_chans": source.in_chans,
        "image_size": config.data.image_size,
        **{name: rate for name, rate in optional.items() if rate is not None},
    }
    for name in ("pretrained", "img_size", *arguments):
        if name in settings.kwargs:
            raise InputError(f"model.kwargs.{name}: comes from other keys of the configuration or from the data")
    for name, value in settings.kwargs.items():
        if value is None:  # timm would leave it out
            raise InputError(f"model.kwargs.{name} = null: must have a value, or go")
    create = partial(create_model, settings.name, **arguments, **settings.kwargs)
    with input_errors("model"):
        model = create(pretrained=pretrained)
    if settings.drop_path_shape == "uniform" and settings.drop_path_rate:
        make_drop_path_uniform(model, settings.drop_path_rate)
    return model
