"""The learning rate of every step: against timm's scheduler, and against arithmetic where timm has no such curve."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from engine.config import OptimizerConfig, ScheduleConfig
from engine.hooks.training import LearningRateSchedule
from engine.optim import WarmupCosine, build_schedule
from engine.train_loop import TrainerBase


@pytest.mark.parametrize("prefix", [False, True])
def test_it_is_timms_cosine_with_warmup(prefix):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.7)
    length = 32 if prefix else 40  # timm counts the cosine without the warmup that precedes it
    reference = CosineLRScheduler(
        optimizer, t_initial=length, lr_min=0.02, warmup_t=8, warmup_lr_init=0.1, warmup_prefix=prefix
    )
    schedule = WarmupCosine(peak=0.7, start=0.1, floor=0.02, total=40, warmup=8, warmup_prefix=prefix)
    for step in range(40):
        reference.step(step)
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


def test_lag_cooldown_and_a_warmup_that_reaches_the_peak():
    plain = WarmupCosine(peak=1.0, start=0.0, floor=0.1, total=20, warmup=4)
    late = WarmupCosine(peak=1.0, start=0.0, floor=0.1, total=20, warmup=4, lag=2)
    assert [late(step) for step in range(20)] == [plain(0)] * 2 + [plain(step) for step in range(18)]
    cooled = WarmupCosine(peak=1.0, start=0.0, floor=0.1, total=20, warmup=4, cooldown=5)
    assert [cooled(step) for step in range(15, 20)] == [0.1] * 5
    assert cooled(10) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 10 / 15)))
    reaching = WarmupCosine(1.0, 0.0, 0.1, total=20, warmup=4, warmup_prefix=True, warmup_reaches_peak=True)
    assert [reaching(step) for step in range(5)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert WarmupCosine(1.0, 0.5, 0.1, total=20, warmup=1, warmup_reaches_peak=True)(0) == 0.5
    assert WarmupCosine(1.0, 0.5, 0.1, total=20, warmup=0)(0) == 1.0


def test_learning_rates_grow_with_the_batch_where_the_recipe_says_so():
    optimizer = OptimizerConfig(lr=0.1, lr_reference_batch=256)
    config = ScheduleConfig(warmup_lr=0.01, min_lr=0.02)
    scaled = build_schedule(config, optimizer, epochs=10, iterations_per_epoch=3, global_batch=1024)
    assert (scaled.peak, scaled.start, scaled.floor) == pytest.approx((0.4, 0.01, 0.02))
    config.scale_with_batch = True
    scaled = build_schedule(config, optimizer, epochs=10, iterations_per_epoch=3, global_batch=1024)
    assert (scaled.peak, scaled.start, scaled.floor) == pytest.approx((0.4, 0.04, 0.08))
    assert (scaled.total, scaled.warmup) == (30, 15)


@pytest.mark.parametrize("per_epoch", [False, True])
def test_the_hook_sets_the_rate_of_every_group(per_epoch):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups, lr=1.0)

    class Loop(TrainerBase):
        epoch = property(lambda self: self.iteration / 4)

        def run_step(self):
            seen.append([group["lr"] for group in self.optimizer.param_groups])

    seen: list[list[float]] = []
    loop = Loop(max_iterations=9)
    loop.optimizer = optimizer
    loop.register_hooks([LearningRateSchedule(lambda step: 1.0 + step, per_epoch)])
    loop.train()
    steps = [iteration // 4 if per_epoch else iteration for iteration in range(9)]
    assert seen == [[1.0 + step, 0.25 * (1.0 + step)] for step in steps]


def test_the_schedule_of_a_resumed_run_needs_no_state():
    schedule = build_schedule(ScheduleConfig(), OptimizerConfig(), 300, 10, 1024)
    hook = LearningRateSchedule(schedule, per_epoch=False)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 1.0}], lr=9.0)
    hook.trainer = SimpleNamespace(iteration=1234, epoch=123.4, optimizer=optimizer)
    hook.before_step()
    assert optimizer.param_groups[0]["lr"] == schedule(1234)
