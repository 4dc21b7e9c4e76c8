"""What a complete configuration must not say: values out of range, keys that do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.config import (
    COLUMNS,
    PHOTOGRAPHS,
    RGB,
    UNTRANSFORMED,
    Config,
    Section,
    has_several_labels,
    image_channels,
    notes,
)
from engine.config_rules import Rule
from engine.errors import InputError


def check(config: Config) -> None:
    """Raise InputError for the first value out of range, or keys that do not go together."""
    for problem in (*_out_of_range(config), *_contradictions(config)):
        raise InputError(problem)


def _out_of_range(section: Section, prefix: str = "") -> Iterator[str]:
    for key, rules in notes(type(section)).items():
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _out_of_range(value, f"{prefix}{key}.")
            continue
        yield from _without_space(value, prefix + key)
        for rule in rules if value is not None else ():
            if isinstance(rule, Rule) and not _holds(rule, value):
                yield f"{prefix}{key} = {value}: allowed is {rule.meaning}"


def _holds(rule: Rule, value: Any) -> bool:
    """Whether a value is allowed; one that cannot even be compared is not."""
    try:
        return rule.allows(value)
    except TypeError:
        return False


def _without_space(content: Any, key: str) -> Iterator[str]:
    """`depth:4`, which YAML takes for a key of that name without a value."""
    content = vars(content) if isinstance(content, Section) else content
    if isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _without_space(value, f"{key}.{name}")
    elif content is None and ":" in key:
        yield f"{key} = null: a space is missing after the colon, {key.replace(':', ': ')}"


def _contradictions(config: Config) -> Iterator[str]:
    """Keys that do not go together."""
    schedule, optimizer, epochs = config.schedule, config.optimizer, config.train.epochs
    if config.loss.target_threshold is not None and config.loss.name != "bce":
        yield "loss.target_threshold: only loss.name = bce has a threshold"
    if config.loss.target_threshold is not None and config.loss.smoothing:
        yield "loss.target_threshold: goes with loss.smoothing = 0 only; smoothed targets of all classes pass it"
    if has_several_labels(config):
        metric = f"evaluation.metric = {config.evaluation.metric}"
        if config.data.dataset in UNTRANSFORMED:
            yield f"{metric}: data.dataset = {config.data.dataset} has one label of each image"
        if config.loss.name != "bce" or config.loss.smoothing:
            yield f"{metric}: images with several labels need loss.name=bce loss.smoothing=0"
    if unknown := sorted(config.data.columns.keys() - set(COLUMNS)):
        yield f"data.columns.{unknown[0]}: allowed is {', '.join(COLUMNS)}"
    yield from _channels(config)
    if config.data.draft_decoding and config.data.cache:
        yield "data.draft_decoding: not with data.cache, for which images are decoded once and whole"
    if config.model.drop_path_shape == "uniform" and config.model.drop_path_rate is None:
        yield "model.drop_path_shape = uniform: needs model.drop_path_rate"
    if config.mixup.integer_pixels and config.data.dataset in UNTRANSFORMED:
        yield f"mixup.integer_pixels: data.dataset = {config.data.dataset} has no pixels of 0 to 255"
    if config.evaluation.metric.startswith("ema_") and not (config.ema.enabled and config.ema.evaluate):
        yield f"evaluation.metric = {config.evaluation.metric}: needs ema.enabled = true and ema.evaluate = true"
    if schedule.warmup_epochs + schedule.cooldown_epochs >= epochs:
        yield (
            f"schedule.warmup_epochs = {schedule.warmup_epochs} and schedule.cooldown_epochs = "
            f"{schedule.cooldown_epochs}: must be less than train.epochs = {epochs} together; of a short run "
            f"for example schedule.warmup_epochs={min(1.0, epochs / 4):g}"
        )
    if schedule.name in ("step", "multistep"):
        if not schedule.decay_epochs or (schedule.name == "step" and len(schedule.decay_epochs) != 1):
            yield f"schedule.name = {schedule.name}: needs schedule.decay_epochs, for example [30]"
        if any(not epoch > 0 for epoch in schedule.decay_epochs):
            yield f"schedule.decay_epochs = {schedule.decay_epochs}: allowed are numbers above 0"
    if schedule.scale_with_batch and optimizer.lr_reference_batch is None:
        yield "schedule.scale_with_batch: needs optimizer.lr_reference_batch, the batch that lr is for"
    if optimizer.full_lr and optimizer.layer_decay is None:
        yield "optimizer.full_lr: without optimizer.layer_decay all modules have the full learning rate"


def _channels(config: Config) -> Iterator[str]:
    """Keys that do not go with the number of channels."""
    data, transform, count = config.data, config.transform, image_channels(config.data)
    if data.dataset in UNTRANSFORMED and data.in_chans not in (None, UNTRANSFORMED[data.dataset]):
        yield f"data.in_chans = {count}: data.dataset = {data.dataset} has {UNTRANSFORMED[data.dataset]}"
    for key in ("mean", "std"):
        values = getattr(transform, key)
        if values is not None and len(values) not in (RGB, count):
            yield f"transform.{key} = {values}: allowed is one number for each of {count} channels, or three"
    if count not in PHOTOGRAPHS:
        for place, is_set in {
            "transform.auto_augment": transform.auto_augment is not None,
            "transform.color_jitter": bool(transform.color_jitter),
            "data.cache": data.cache is not None,
            "mixup.integer_pixels": config.mixup.integer_pixels,
        }.items():
            if is_set:
                yield f"{place}: is for images with colours or grey ones, and data.in_chans = {count}"
