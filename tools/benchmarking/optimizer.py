"""The optimiser's step and the moving average alone, without any model's forward."""

from __future__ import annotations

import copy
import statistics

import torch
from timm.optim import Lamb
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import AdamW, Optimizer

from models.build import create_model
from tools.benchmarking.figures import Figure, in_turns, ratio_of
from tools.benchmarking.steps import Timing

EQUAL_STEPS, EQUAL = 50, 1e-6  # after that many steps weights differ by no more
LAMB_SPEEDUP = 2.0  # target


def measure_optimizer(model_name: str, timing: Timing) -> list[Figure]:
    """One tensor after the other against all of them together (foreach), on the parameters of a model."""
    model = create_model(model_name).to(timing.device)
    steps = {
        "LAMB, loop": _optimizer(model, Lamb, foreach=False).step,
        "LAMB, foreach": _optimizer(model, Lamb).step,
        "AdamW, loop": _optimizer(model, AdamW, foreach=False).step,
        "AdamW, foreach": _optimizer(model, AdamW, foreach=True).step,
        "AdamW, fused": _optimizer(model, AdamW, fused=True).step,
    }
    for name, foreach in (("EMA, loop", False), ("EMA, foreach", True)):
        average = ModelEmaV3(model, foreach=foreach)
        steps[name] = lambda average=average: average.update(model)
    seconds = in_turns(steps, timing.rounds, timing.warm_up, timing.device, timing.repeats)
    case = f"{model_name}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"
    figures = []
    for name, times in seconds.items():
        loop = f"{name.partition(',')[0]}, loop"
        compared = {} if name == loop else {**ratio_of(seconds[loop], times), "against": f"{loop}, speed-up"}
        wanted = {"target": LAMB_SPEEDUP, "at_least": True} if name == "LAMB, foreach" else {}
        figures.append(Figure("optimizer", case, name, 1e3 * statistics.median(times), "ms", **compared, **wanted))
    return figures


def measure_equality(model_name: str, device: torch.device) -> list[Figure]:
    """The largest difference of a weight between LAMB's two ways, after many steps with the same gradients."""
    torch.manual_seed(0)
    models = [create_model(model_name).to(device)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        _optimizer(model, Lamb, foreach=foreach) for model, foreach in zip(models, (False, True), strict=True)
    ]
    for _ in range(EQUAL_STEPS):
        gradients = [torch.randn_like(parameter) for parameter in models[0].parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad.copy_(gradient)
            optimizer.step()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    difference = max((one - other).abs().max().item() for one, other in pairs)
    case = f"{model_name}, {EQUAL_STEPS} steps of LAMB"
    note = f"target: at most {EQUAL:.0e}: {'met' if difference <= EQUAL else 'missed'}"
    return [Figure("optimizer", case, "loop and foreach, largest difference", difference, "", note=note)]


def _optimizer(model: nn.Module, of: type[Optimizer], **options: bool) -> Optimizer:
    """With a gradient for every parameter."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.randn_like(parameter)
    return of(model.parameters(), lr=1e-4, weight_decay=0.05, **options)
