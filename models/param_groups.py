"""Parameter groups: which tensors have weight decay, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None, full_lr: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser, each with `weight_decay` and `lr_scale`. Every tensor that learns is in one.

    They are timm's, without weight decay for 1-D tensors and what `model.no_weight_decay()` names; those of equal
    settings are one, in the order of the model.

    Args:
        model: a timm model; it tells the order of its layers (`group_matcher`).
        weight_decay: of all other tensors.
        layer_decay: layer i of n learns at layer_decay ** (n - i), the head (n) at 1 (BEiT, arXiv 2106.08254);
            None: all at 1.
        full_lr: names of modules that learn at 1 too.

    Raises:
        ValueError: if a name in `full_lr` is not in the model, or the model does not tell its layers.
    """
    for module in full_lr:
        if not any(_is_in(name, module) for name, _ in model.named_parameters()):
            raise ValueError(f"full_lr: the model has no module {module!r}")
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if layer_decay is None:
        timms = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)
    elif hasattr(model, "group_matcher") or getattr(model, "pretrained_cfg", {}).get("classifier"):
        timms = param_groups_layer_decay(model, weight_decay, undecayed, layer_decay=layer_decay)
    else:
        raise ValueError("layer_decay: the model does not tell the order of its layers")
    settings = {
        parameter: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in timms
        for parameter in group["params"]
    }
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter in settings:  # it learns
            decay, scale = settings[parameter]
            scale = 1.0 if any(_is_in(name, module) for module in full_lr) else scale
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
