"""Every optimiser of timm that a CPU can run goes on exactly where it stopped; the learning rate of every step."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from timm.optim import list_optimizers
from timm.optim._optim_factory import OptimInfo, default_registry
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from engine.config import Config, OptimizerConfig, ScheduleConfig
from engine.config_check import check
from engine.errors import InputError
from engine.hooks.training import LearningRateSchedule
from engine.optim import Schedule, build_optimizer, build_schedule

NEED_A_GPU, NEEDS_SECOND_DERIVATIVES = ("bnb", "fused"), ("adahessian",)
NAMES = [name for name in list_optimizers() if not name.startswith(NEED_A_GPU) and name not in NEEDS_SECOND_DERIVATIVES]


def build(name: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
    return model, build_optimizer(OptimizerConfig(name=name), groups)


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(2, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_an_optimiser_goes_on_exactly(name):
    model, optimizer = build(name)
    for seed in (1, 2):
        step(model, optimizer, seed)
    state = copy.deepcopy(optimizer.state_dict())
    resumed_model, resumed = build(name)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    step(model, optimizer, seed=3)
    step(resumed_model, resumed, seed=3)
    for parameter, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(parameter, other)


class Closing(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def test_an_optimiser_that_is_unknown_or_needs_more_than_gradients_is_refused(monkeypatch):
    default_registry.register(OptimInfo("closing", Closing, "computes the loss again"))
    refused = {
        "admw": "timm has no such optimiser, did you mean 'adamw'",
        "adahessian": "needs the gradient's own graph",
        "closing": "its step needs a closure",
    }
    try:
        for name, reason in refused.items():
            with pytest.raises(InputError, match=f"optimizer.name = {name}: {reason}"):
                build(name)
    finally:
        del default_registry._optimizers["closing"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, package in (("fusedadam", "apex"), ("bnbadam8bit", "bitsandbytes")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"require {package} to be installed"):
            build(name)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_schedule_is_timms_cosine_with_warmup(prefix):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.7)
    length = 32 if prefix else 40  # timm counts the cosine without the warmup that precedes it
    reference = CosineLRScheduler(
        optimizer, t_initial=length, lr_min=0.02, warmup_t=8, warmup_lr_init=0.1, warmup_prefix=prefix
    )
    schedule = Schedule(
        peak=0.7, start=0.1, floor=0.02, total=40, warmup=8, config=ScheduleConfig(warmup_prefix=prefix)
    )
    for step in range(40):
        reference.step(step)
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        (lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20), {"name": "linear"}),
        (lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 20, 2.0), {"name": "polynomial", "power": 2.0}),
        (lambda optimizer: lr_scheduler.StepLR(optimizer, 5, 0.3), {"name": "step", "milestones": (5, 10, 15)}),
        (
            lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 11], 0.3),
            {"name": "multistep", "milestones": (3, 11)},
        ),
        (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20), {"name": "cosine"}),
        (lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0), {"name": "constant"}),
        (
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=21, pct_start=7 / 21),
            {"name": "one_cycle", "start": 0.04, "floor": 0.04 / 1e4, "warmup": 6, "warmup_prefix": True},
        ),
    ],
)
def test_the_schedules_are_torchs(reference, options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    usual = {"peak": 1.0, "start": 0.0, "floor": 0.0, "total": 20, "warmup": 0}
    shape = {key: value for key, value in options.items() if key in vars(ScheduleConfig())}
    numbers = {key: value for key, value in options.items() if key not in shape}
    own = Schedule(**usual | numbers, config=ScheduleConfig(decay_rate=0.3, **shape))
    theirs = reference(optimizer)
    for step in range(20):
        assert own(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_warmup_stable_decay():
    config = ScheduleConfig(name="wsd", warmup_prefix=True, decay_share=0.25)
    schedule = Schedule(1.0, 0.0, 0.1, total=44, warmup=4, config=config)
    assert [schedule(step) for step in (0, 2, 4, 20, 34)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert [schedule(step) for step in (39, 44)] == pytest.approx([0.1 + 0.9 * 0.5, 0.1])


def test_epochs_of_a_schedule_become_steps_and_missing_ones_are_refused():
    config = ScheduleConfig(name="step", decay_epochs=[2.5], unit="iteration")
    schedule = build_schedule(config, OptimizerConfig(), epochs=6, iterations_per_epoch=4, global_batch=8)
    assert schedule.milestones == (10, 20)
    for name, epochs in (("step", []), ("step", [1, 2]), ("multistep", [])):
        with pytest.raises(InputError, match=f"schedule.name = {name}: needs schedule.decay_epochs, for example"):
            check(Config(schedule=ScheduleConfig(name=name, decay_epochs=epochs)))
    with pytest.raises(InputError, match="allowed are numbers above 0"):
        check(Config(schedule=ScheduleConfig(name="multistep", decay_epochs=[3, -1])))


def test_lag_cooldown_and_a_warmup_that_reaches_the_peak():
    plain = Schedule(peak=1.0, start=0.0, floor=0.1, total=20, warmup=4)
    late = Schedule(peak=1.0, start=0.0, floor=0.1, total=20, warmup=4, lag=2)
    assert [late(step) for step in range(20)] == [plain(0)] * 2 + [plain(step) for step in range(18)]
    cooled = Schedule(peak=1.0, start=0.0, floor=0.1, total=20, warmup=4, cooldown=5)
    assert [cooled(step) for step in range(15, 20)] == [0.1] * 5
    assert cooled(10) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 10 / 15)))
    config = ScheduleConfig(warmup_prefix=True, warmup_reaches_peak=True)
    reaching = Schedule(1.0, 0.0, 0.1, total=20, warmup=4, config=config)
    assert [reaching(step) for step in range(5)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert Schedule(1.0, 0.5, 0.1, total=20, warmup=1, config=config)(0) == 0.5
    assert Schedule(1.0, 0.5, 0.1, total=20, warmup=0)(0) == 1.0


def test_learning_rates_grow_with_the_batch_where_the_recipe_says_so():
    optimizer = OptimizerConfig(lr=0.1, lr_reference_batch=256)
    for scales_ends, expected in ((False, (0.4, 0.01, 0.02)), (True, (0.4, 0.04, 0.08))):
        config = ScheduleConfig(warmup_lr=0.01, min_lr=0.02, scale_with_batch=scales_ends)
        scaled = build_schedule(config, optimizer, epochs=10, iterations_per_epoch=3, global_batch=1024)
        assert (scaled.peak, scaled.start, scaled.floor) == pytest.approx(expected)
        assert (scaled.total, scaled.warmup) == (30, 15)


@pytest.mark.parametrize("per_epoch", [False, True])
def test_the_hook_sets_the_rate_of_every_group_and_needs_no_state(per_epoch):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    schedule = Schedule(peak=1.0, start=0.0, floor=0.1, total=2000, warmup=4)
    hook = LearningRateSchedule(schedule, per_epoch)
    for iteration in (1234, 5, 6):
        hook.trainer = SimpleNamespace(iteration=iteration, epoch=iteration / 4, optimizer=optimizer)
        hook.before_step()
        expected = schedule(iteration // 4 if per_epoch else iteration)
        assert [group["lr"] for group in optimizer.param_groups] == [expected, 0.25 * expected]
