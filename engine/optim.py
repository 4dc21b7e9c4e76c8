"""The optimiser, timm's, and its learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from torch.optim import Optimizer

from augsub.named_registry import did_you_mean
from engine.config import OptimizerConfig, ScheduleConfig
from engine.distributed import is_lost_contact
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
        if is_out_of_memory(error) or is_lost_contact(error):
            raise
        raise InputError(
            "optimizer: its arguments, or its state in the checkpoint, do not fit: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step; a step is an iteration or an epoch.

    With t = max(0, step - lag) and W = warmup:

    - t < W: from `start` towards `peak`, by t / W, or by t / (W - 1) if `warmup_reaches_peak`; of one_cycle along a
      cosine;
    - else: from `peak` to `floor` by the share s(t / T) over T = total - cooldown steps; with `warmup_prefix` both t
      and T are counted from the end of the warmup;
    - then: `floor`.

    The share that is left of peak - floor, s(p) at the part p of the way:

    - cosine, one_cycle: (1 + cos(pi p)) / 2
    - linear, polynomial: (1 - p) ** power, which is 1 for linear
    - constant, plateau: 1
    - step, multistep: decay_rate ** n after n of the steps `milestones`, which count from the beginning of the run
    - wsd (warmup, stable, decay): 1, and linear to 0 over the last `decay_share` of the way

    Attributes:
        peak, start, floor: learning rates.
        total, warmup, cooldown, lag: numbers of steps.
        milestones: steps at which the rate falls.
        config: says the shape; its epochs are steps here.
    """

    peak: float
    start: float
    floor: float
    total: int
    warmup: int
    cooldown: int = 0
    lag: int = 0
    milestones: Sequence[int] = ()
    config: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __call__(self, step: int) -> float:
        t, length = max(0, step - self.lag), self.total - self.cooldown
        if t < self.warmup:
            way = t / max(1, self.warmup - self.config.warmup_reaches_peak)
            return self.start + (self.peak - self.start) * (
                1 - _cosine(way) if self.config.name == "one_cycle" else way
            )
        passed = sum(milestone <= t for milestone in self.milestones)
        if self.config.warmup_prefix:
            t, length = t - self.warmup, length - self.warmup
        if t >= length:
            return self.floor
        return self.floor + self.share(t / length, passed) * (self.peak - self.floor)

    def share(self, way: float, passed: int) -> float:
        """What is left of peak - floor at a part of the way, after so many milestones."""
        return {
            "cosine": _cosine(way),
            "one_cycle": _cosine(way),
            "linear": 1 - way,
            "polynomial": (1 - way) ** self.config.power,
            "constant": 1.0,
            "plateau": 1.0,
            "step": self.config.decay_rate**passed,
            "multistep": self.config.decay_rate**passed,
            "wsd": min(1.0, (1 - way) / self.config.decay_share),
        }[self.config.name]


def _cosine(way: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * way))


def build_schedule(
    config: ScheduleConfig, optimizer: OptimizerConfig, epochs: int, iterations_per_epoch: int, global_batch: int
) -> Schedule:
    """The schedule of a run, with its learning rates scaled to the global batch."""
    steps_per_epoch = 1 if config.unit == "epoch" else iterations_per_epoch
    scale = global_batch / optimizer.lr_reference_batch if optimizer.lr_reference_batch else 1.0
    ends_scale = scale if config.scale_with_batch else 1.0
    milestones = config.decay_epochs
    if config.name == "step":
        milestones = [number * milestones[0] for number in range(1, 1 + int(epochs / milestones[0]))]
    return Schedule(
        peak=scale * optimizer.lr,
        start=ends_scale * config.warmup_lr,
        floor=ends_scale * config.min_lr,
        total=epochs * steps_per_epoch,
        warmup=round(config.warmup_epochs * steps_per_epoch),
        cooldown=round(config.cooldown_epochs * steps_per_epoch),
        lag=config.lag,
        milestones=tuple(round(epoch * steps_per_epoch) for epoch in milestones),
        config=config,
    )
