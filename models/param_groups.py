"""Parameter groups: which tensors have weight decay, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None, full_lr: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, each with `weight_decay` and `lr_scale`. Every tensor that learns is in one.

    No weight decay: 1-D tensors, names ending in .bias, and what `model.no_weight_decay()` names.

    Args:
        model: a timm model; it tells the order of its layers (`group_matcher`).
        weight_decay: of all other tensors.
        layer_decay: layer i of n learns at layer_decay ** (n - i), the head (n) at 1 (BEiT, arXiv 2106.08254);
            None: all at 1.
        full_lr: names of modules that learn at 1 too.

    Raises:
        ValueError: if a name in `full_lr` is not in the model, or the model does not tell its layers.
    """
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    scales = _layer_scales(model, layer_decay, full_lr)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in undecayed
            groups.setdefault((weight_decay if decays else 0.0, scales[name]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def _layer_scales(model: nn.Module, layer_decay: float | None, full_lr: Sequence[str]) -> dict[str, float]:
    """Learning rate of each parameter in parts of the head's, by name."""
    names = [name for name, _ in model.named_parameters()]
    for module in full_lr:
        if not any(_is_in(name, module) for name in names):
            raise ValueError(f"full_lr: the model has no module {module!r}")
    if layer_decay is None:
        return dict.fromkeys(names, 1.0)
    if hasattr(model, "group_matcher"):
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(model)
    head = max(layers.values())
    if head == 0:
        raise ValueError("layer_decay: the model does not tell the order of its layers")
    return {
        name: 1.0 if any(_is_in(name, module) for module in full_lr) else layer_decay ** (head - layers.get(name, head))
        for name in names
    }


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
