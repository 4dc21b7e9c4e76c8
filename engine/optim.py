"""The optimiser, timm's, and its learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from torch.optim import Optimizer

from augsub.named_registry import did_you_mean
from engine.config import OptimizerConfig, ScheduleConfig
from engine.errors import InputError, first_line, input_errors, is_out_of_memory

FUSED = ("adam", "adamw", "sgd")  # of torch's own optimisers; timm's LAMB and others work on many tensors at once


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """timm's optimiser over parameter groups with their own `weight_decay` and `lr_scale`."""
    known = list_optimizers()
    if config.name not in known:
        raise InputError(
            f"optimizer.name = {config.name}: timm has no such optimiser"
            f"{did_you_mean(config.name, known)} (timm.optim.list_optimizers() names them all)"
        )
    optional = {"betas": config.betas and tuple(config.betas), "eps": config.eps}
    arguments = {name: value for name, value in optional.items() if value is not None}
    if config.name in FUSED and groups[0]["params"][0].is_cuda:
        arguments["fused"] = True  # one kernel instead of a dozen
    with input_errors("optimizer"):
        optimizer = create_optimizer_v2(
            groups, opt=config.name, lr=config.lr, weight_decay=0.0, **{**arguments, **config.kwargs}
        )
    for need in _needs_of_a_step(optimizer):
        raise InputError(f"optimizer.name = {config.name}: {need}; use an optimiser that takes gradients alone")
    return optimizer


def _needs_of_a_step(optimizer: Optimizer) -> Iterator[str]:
    """What a step takes beside gradients, and no run gives it."""
    if getattr(optimizer, "is_second_order", False):  # so timm marks AdaHessian
        yield "needs the gradient's own graph, which a backward of each branch does not keep"
    for name, parameter in inspect.signature(optimizer.step).parameters.items():
        if parameter.default is parameter.empty:  # L-BFGS computes the loss as often as it likes
            yield f"its step needs a {name}"


@contextmanager
def optimizer_errors() -> Iterator[None]:
    """Report what an optimiser raises at a step: it does not look at its arguments or its state before."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            "optimizer: its arguments, or its state in the checkpoint, do not fit: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


@dataclass(frozen=True)
class WarmupCosine:
    """Learning rate of each step; a step is an iteration or an epoch.

    With t = max(0, step - lag) and W = warmup:

    - t < W: from `start` towards `peak`, by t / W, or by t / (W - 1) if `warmup_reaches_peak`;
    - else: from `peak` to `floor` along (1 + cos(pi t / T)) / 2 over T = total - cooldown steps; with
      `warmup_prefix` both t and T are counted from the end of the warmup;
    - then: `floor`.

    Attributes:
        peak, start, floor: learning rates.
        total, warmup, cooldown, lag: numbers of steps.
    """

    peak: float
    start: float
    floor: float
    total: int
    warmup: int
    cooldown: int = 0
    lag: int = 0
    warmup_prefix: bool = False
    warmup_reaches_peak: bool = False

    def __call__(self, step: int) -> float:
        t, length = max(0, step - self.lag), self.total - self.cooldown
        if t < self.warmup:
            last = max(1, self.warmup - self.warmup_reaches_peak)
            return self.start + (self.peak - self.start) * t / last
        if self.warmup_prefix:
            t, length = t - self.warmup, length - self.warmup
        if t >= length:
            return self.floor
        return self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * t / length))


def build_schedule(
    config: ScheduleConfig, optimizer: OptimizerConfig, epochs: int, iterations_per_epoch: int, global_batch: int
) -> WarmupCosine:
    """The schedule of a run, with its learning rates scaled to the global batch."""
    steps_per_epoch = 1 if config.unit == "epoch" else iterations_per_epoch
    scale = global_batch / optimizer.lr_reference_batch if optimizer.lr_reference_batch else 1.0
    ends_scale = scale if config.scale_with_batch else 1.0
    return WarmupCosine(
        peak=scale * optimizer.lr,
        start=ends_scale * config.warmup_lr,
        floor=ends_scale * config.min_lr,
        total=epochs * steps_per_epoch,
        warmup=round(config.warmup_epochs * steps_per_epoch),
        cooldown=round(config.cooldown_epochs * steps_per_epoch),
        lag=config.lag,
        warmup_prefix=config.warmup_prefix,
        warmup_reaches_peak=config.warmup_reaches_peak,
    )
