"""Every optimiser of timm that a CPU can run goes on exactly where it stopped."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from timm.optim import list_optimizers
from timm.optim._optim_factory import OptimInfo, default_registry
from torch import nn
from torch.optim import Optimizer

from engine.config import OptimizerConfig
from engine.errors import InputError
from engine.optim import build_optimizer, load_optimizer

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
    load_optimizer(resumed, state)
    step(model, optimizer, seed=3)
    step(resumed_model, resumed, seed=3)
    for parameter, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(parameter, other)


class Closing(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def test_an_optimiser_that_needs_more_than_gradients_is_refused():
    default_registry.register(OptimInfo("closing", Closing, "computes the loss again"))
    try:
        for name, need in (("adahessian", "needs the gradient's own graph"), ("closing", "its step needs a closure")):
            with pytest.raises(InputError, match=f"optimizer.name = {name}: {need}"):
                build(name)
    finally:
        del default_registry._optimizers["closing"]


@pytest.mark.parametrize(("name", "package"), [("fusedadam", "apex"), ("bnbadam8bit", "bitsandbytes")])
def test_an_optimiser_of_a_package_that_is_missing_is_refused(name, package, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"require {package} to be installed"):
        build(name)


def test_a_state_of_another_shape_is_refused():
    model, optimizer = build("adamw")
    step(model, optimizer, seed=1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="exp_avg does not have the shape of its parameter"):
        load_optimizer(build("adamw")[1], state)
