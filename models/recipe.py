"""What recipes do to a timm model before training: initial values, stochastic depth, frozen parts, parameter groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from augsub.families.base import drop_path_places, has_residual
from models.weights import head_tensors


def make_drop_path_uniform(model: nn.Module, rate: float) -> None:
    """Give every residual branch the same stochastic-depth rate; timm ramps it up from 0 in the first block."""
    for parent, name, _ in drop_path_places(model):
        if has_residual(parent):
            setattr(parent, name, DropPath(rate).train(parent.training))


def restart(model: nn.Module, names: Sequence[str]) -> None:
    """Give the modules of these names the initial values of their classes: weight 1 and bias 0 for a norm.

    Raises:
        ValueError: no such module, or one whose class does not know its initial values.
    """
    for name in names:
        for module in _module(model, name, "restart").modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"restart: {type(module).__name__} in {name!r} has no initial values of its own")


def start_head(model: nn.Module, std: float, bias_bound: float = 0.0) -> None:
    """Draw the head's weights from a truncated normal of this std, its biases uniformly up to a bound.

    Raises:
        ValueError: the model's head is no linear layer.
    """
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear):
        raise ValueError("head_std: the model's head is no linear layer")
    nn.init.trunc_normal_(head.weight, std=std)  # cut at +-2, not at 2 std, as everywhere in timm
    if head.bias is not None:
        nn.init.uniform_(head.bias, -bias_bound, bias_bound)


def start_class_token(model: nn.Module, std: float) -> None:
    """Draw the class token from a truncated normal of this std.

    Raises:
        ValueError: the model has none.
    """
    if getattr(model, "cls_token", None) is None:
        raise ValueError("class_token_std: the model has no class token")
    nn.init.trunc_normal_(model.cls_token, std=std)


ALL_BUT_HEAD = "all_but_head"  # in place of names: everything but the classifier


def frozen_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of parameters and modules in the place of patterns (blocks.[0-5].*) and of `ALL_BUT_HEAD`.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    parameters = [name for name, _ in model.named_parameters()]
    found: dict[str, None] = {}
    for name in names:
        own = [name]
        if name == ALL_BUT_HEAD:
            own = [tensor for tensor in parameters if tensor not in head_tensors(model) and tensor != "mask_token"]
        elif set("*?[") & set(name):
            own = fnmatch.filter(parameters, name)
            if not own:
                raise ValueError(f"frozen: the model has no parameter like {name!r}")
        found |= dict.fromkeys(own)
    return [*found]


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Let the parameters of these names, or of the modules of these names, not learn.

    Args:
        names: also patterns, as for `frozen_names`.

    Raises:
        ValueError: no such parameter or module, or nothing is left to learn but the mask token.
    """
    parameters = dict(model.named_parameters())
    for name in frozen_names(model, names):
        frozen = [parameters[name]] if name in parameters else _module(model, name, "frozen").parameters()
        for parameter in frozen:
            parameter.requires_grad_(False)
    if _is_frozen([parameter for name, parameter in parameters.items() if name != "mask_token"]):
        raise ValueError("frozen: nothing is left to learn; leave the head out, or some of the last modules")


def frozen_batchnorms(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Layers with running statistics in the modules of these names, and those of whose own parameters all are frozen.

    Args:
        names: as for `freeze`.
    """
    modules = dict(model.named_modules())
    inside = {part for name in frozen_names(model, names) if name in modules for part in modules[name].modules()}
    return [
        layer
        for layer in model.modules()
        if hasattr(layer, "running_var") and (layer in inside or _is_frozen(list(layer.parameters(recurse=False))))
    ]


def _is_frozen(parameters: Sequence[nn.Parameter]) -> bool:
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _module(model: nn.Module, name: str, key: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{key}: the model has no part named {name!r}") from error


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
