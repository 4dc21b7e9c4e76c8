"""Which values a configuration may have: one row per rule."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import reduce
from typing import Any

from engine.config import UNTRANSFORMED, Config
from engine.errors import InputError

Rule = tuple[Callable[[Any], bool], str]
LARGEST, LARGEST_WHOLE = 1e38, 2**63  # what fits into float32 and int64
LONGEST = 200  # characters of a value in a message


def at_least(bound: float) -> Rule:
    """A finite number that is not below `bound`."""
    return lambda value: bound <= value < math.inf, f"at least {bound}"


def above(bound: float) -> Rule:
    """A finite number greater than `bound`."""
    return lambda value: bound < value < math.inf, f"greater than {bound}"


def share(value: Any) -> bool:
    """In [0, 1)."""
    return 0 <= value < 1


def probability(value: Any) -> bool:
    """In [0, 1]."""
    return 0 <= value <= 1


def one_of(*allowed: str | bool) -> Rule:
    """One of a few words."""
    return lambda value: value in allowed, "one of " + ", ".join(str(word).lower() for word in allowed)


def interval(low_bound: float) -> Rule:
    """Two increasing numbers, the first one above `low_bound`."""
    return (
        lambda value: len(value) == 2 and low_bound < value[0] <= value[1] < math.inf,
        f"two increasing numbers above {low_bound}",
    )


SHARE: Rule = (share, "in [0, 1)")
PROBABILITY: Rule = (probability, "in [0, 1]")


def three(low: float, meaning: str) -> Rule:
    """One number for each of three channels, all above `low`."""
    return lambda value: len(value) == 3 and all(low < number < math.inf for number in value), f"three {meaning}"


def nameable(value: str) -> bool:
    """Whether a file system can have a file of that name at all."""
    return "\0" not in value and len(os.fsencode(value)) < 4096 and max(map(len, os.fsencode(value).split(b"/"))) < 256


PATH: Rule = (nameable, "a path of at most 4095 bytes, of which each name has at most 255")

RULES: dict[str, Rule] = {
    "output_dir": PATH,
    "data.root": PATH,
    "model.checkpoint": PATH,
    "evaluation.checkpoint": PATH,
    "seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
    "model.pretrained": one_of(True, False, "if_available"),
    "model.drop_path_rate": SHARE,
    "model.drop_path_shape": one_of("linear", "uniform"),
    "model.drop_rate": SHARE,
    "model.class_token_std": above(0),
    "model.head_std": above(0),
    "model.head_bias_bound": at_least(0),
    "data.image_size": at_least(1),
    "data.workers": at_least(0),
    "data.bad_files": at_least(0),
    "data.repeats": at_least(1),
    "data.synthetic_samples": at_least(1),
    "transform.scale": interval(0),
    "transform.ratio": interval(0),
    "transform.interpolation": one_of("bicubic", "bilinear", "random"),
    "transform.hflip": PROBABILITY,
    "transform.vflip": PROBABILITY,
    "transform.color_jitter": at_least(0),
    "transform.random_erase": PROBABILITY,
    "transform.erase_mode": one_of("pixel", "rand", "const"),
    "transform.erase_count": at_least(1),
    "transform.erase_area": (
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
        "two increasing numbers in (0, 1]",
    ),
    "transform.mean": three(-math.inf, "numbers"),
    "transform.std": three(0, "numbers above 0"),
    "transform.eval_crop_mode": one_of("center", "squash", "border"),
    "transform.erase_aspect": interval(0),
    "transform.eval_interpolation": one_of("bicubic", "bilinear"),
    "transform.eval_crop": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "augsub.main_weight": at_least(0),
    "train.epochs": at_least(1),
    "train.max_iters": at_least(1),
    "train.global_batch": at_least(1),
    "train.micro_batch": at_least(1),
    "train.accumulation": at_least(1),
    "train.loss_scale": at_least(1),
    "train.loss_scale_window": at_least(1),
    "train.amp": one_of("off", "bf16", "fp16"),
    "train.clip_norm": above(0),
    "optimizer.lr": above(0),
    "optimizer.lr_reference_batch": at_least(1),
    "optimizer.layer_decay": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "optimizer.weight_decay": at_least(0),
    "optimizer.betas": (lambda value: len(value) == 2 and all(map(share, value)), "two numbers in [0, 1)"),
    "optimizer.eps": above(0),
    "schedule.warmup_epochs": at_least(0),
    "schedule.warmup_lr": at_least(0),
    "schedule.min_lr": at_least(0),
    "schedule.cooldown_epochs": at_least(0),
    "schedule.lag": at_least(0),
    "schedule.unit": one_of("iteration", "epoch"),
    "loss.name": one_of("cross_entropy", "bce"),
    "loss.smoothing": SHARE,
    "loss.target_threshold": SHARE,
    "mixup.mixup_alpha": at_least(0),
    "mixup.cutmix_alpha": at_least(0),
    "mixup.prob": PROBABILITY,
    "mixup.switch_prob": PROBABILITY,
    "mixup.mode": one_of("batch", "pair", "elem"),
    "mixup.cutmix_minmax": (
        lambda value: len(value) == 2 and 0 < value[0] < value[1] <= 1,
        "two increasing numbers above 0, at most 1",
    ),
    "mixup.off_epoch": at_least(0),
    "ema.decay": SHARE,
    "evaluation.period": at_least(1),
    "evaluation.batch": at_least(1),
    "evaluation.metric": one_of("top1", "ema_top1"),
    "checkpoint.period": at_least(1),
    "checkpoint.every_minutes": above(0),
    "checkpoint.keep": at_least(0),
    "distributed.strategy": one_of("ddp", "fsdp2"),
    "distributed.timeout_minutes": above(0),
    "log.period": at_least(1),
    "log.wandb": (
        lambda value: 0 < len(value) <= 128 and not set(value) & set("/\\#?%:"),
        "1 to 128 characters, none of / \\ # ? % :",
    ),
}

PATHS = tuple(key for key, rule in RULES.items() if rule is PATH)


def check(config: Config) -> None:
    """Raise InputError for the first value that is out of range; null is left alone."""
    for key, number in _numbers(asdict(config)):
        if LARGEST < abs(number) < math.inf or (isinstance(number, int) and abs(number) > LARGEST_WHOLE):
            raise InputError(f"{key} = {shortened(number)}: too large, allowed is {LARGEST:g}, of whole numbers 2**63")
    for key in _unspaced(asdict(config)):
        raise InputError(f"{key} = null: a space is missing after the colon, {key.replace(':', ': ')}")
    for key, (allowed, meaning) in RULES.items():
        value = reduce(getattr, key.split("."), config)
        if value is not None and not _holds(allowed, value):
            raise InputError(f"{key} = {shortened(value)}: allowed is {meaning}")
    for problem in _contradictions(config):
        raise InputError(problem)


def shortened(value: Any) -> str:
    """A value in a message."""
    text = str(value) if not isinstance(value, int) or abs(value) <= LARGEST_WHOLE else f"{str(value)[:20]}…"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _holds(allowed: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value is allowed; one that cannot even be compared is not."""
    try:
        return allowed(value)
    except TypeError:
        return False


def _values(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values that are no mappings or lists, with the keys that lead to them."""
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for step, value in pairs:
            yield from _values(value, f"{key}.{step}" if key else str(step))
    else:
        yield key, content


def _numbers(content: Any) -> Iterator[tuple[str, int | float]]:
    return ((key, value) for key, value in _values(content) if isinstance(value, int | float))


def _unspaced(content: Any) -> Iterator[str]:
    """Keys like `depth:4`, which YAML takes for a key without a value."""
    return (key for key, value in _values(content) if value is None and ":" in key)


def _contradictions(config: Config) -> Iterator[str]:
    """Keys that do not go together."""
    schedule, optimizer, epochs = config.schedule, config.optimizer, config.train.epochs
    if config.loss.target_threshold is not None and config.loss.name != "bce":
        yield "loss.target_threshold: only loss.name = bce has a threshold"
    if config.loss.target_threshold is not None and config.loss.smoothing:
        yield "loss.target_threshold: goes with loss.smoothing = 0 only; smoothed targets of all classes pass it"
    if config.model.drop_path_shape == "uniform" and config.model.drop_path_rate is None:
        yield "model.drop_path_shape = uniform: needs model.drop_path_rate"
    if config.mixup.integer_pixels and config.data.dataset in UNTRANSFORMED:
        yield f"mixup.integer_pixels: data.dataset = {config.data.dataset} has no pixels of 0 to 255"
    if config.evaluation.metric == "ema_top1" and not (config.ema.enabled and config.ema.evaluate):
        yield "evaluation.metric = ema_top1: needs ema.enabled = true and ema.evaluate = true"
    if schedule.warmup_epochs + schedule.cooldown_epochs >= epochs:
        yield (
            f"schedule.warmup_epochs = {schedule.warmup_epochs} and schedule.cooldown_epochs = "
            f"{schedule.cooldown_epochs}: must be less than train.epochs = {epochs} together"
        )
    if schedule.scale_with_batch and optimizer.lr_reference_batch is None:
        yield "schedule.scale_with_batch: needs optimizer.lr_reference_batch, the batch that lr is for"
    if optimizer.full_lr and optimizer.layer_decay is None:
        yield "optimizer.full_lr: without optimizer.layer_decay all modules have the full learning rate"
