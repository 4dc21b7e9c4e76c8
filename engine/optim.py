"""Optimiser and learning-rate schedule, both timm's."""

from __future__ import annotations

import difflib

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from engine.config import OptimizerConfig, ScheduleConfig
from engine.errors import InputError, input_errors


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """timm's optimiser; no weight decay on biases, 1-D tensors and what `model.no_weight_decay()` names."""
    known = list_optimizers()
    if config.name not in known:
        match = difflib.get_close_matches(config.name, known, n=1)
        raise InputError(
            f"optimizer.name = {config.name}: timm has no such optimiser"
            f"{f', did you mean {match[0]}?' if match else ''} (timm.optim.list_optimizers() names them all)"
        )
    optional = {"betas": config.betas and tuple(config.betas), "eps": config.eps}
    arguments = {name: value for name, value in optional.items() if value is not None}
    with input_errors("optimizer"):
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            filter_bias_and_bn=True,
            **arguments,
            **config.kwargs,
        )


def build_schedule(
    config: ScheduleConfig, optimizer: Optimizer, epochs: int, iterations_per_epoch: int
) -> CosineLRScheduler:
    """timm's cosine with linear warmup, per iteration or per epoch: a pure function of where the run stands."""
    per_epoch = config.unit == "epoch"
    steps_per_epoch = 1 if per_epoch else iterations_per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch,
        lr_min=config.min_lr,
        warmup_t=round(config.warmup_epochs * steps_per_epoch),
        warmup_lr_init=config.warmup_lr,
        warmup_prefix=config.warmup_prefix,
        t_in_epochs=per_epoch,
    )
