"""The learning rate as a pure function of the step: linear warmup, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config import OptimizerConfig, ScheduleConfig


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
