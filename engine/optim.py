"""The optimiser, timm's."""

from __future__ import annotations

import difflib
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from torch.optim import Optimizer

from engine.config import OptimizerConfig
from engine.errors import InputError, input_errors


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """timm's optimiser over parameter groups with their own `weight_decay` and `lr_scale`."""
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
            groups, opt=config.name, lr=config.lr, weight_decay=0.0, **arguments, **config.kwargs
        )
