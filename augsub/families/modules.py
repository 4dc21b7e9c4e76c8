"""Stochastic-depth and dropout modules of a model, found by the names that timm gives them."""

from __future__ import annotations

import re

from timm.layers import DropPath
from torch import nn

DROP_PATH_NAME = re.compile(r"drop_path\d?")
DROPOUT_NAMES = frozenset({"proj_drop", "mlp_drop", "drop1", "drop2"})  # not attention weights, positions or head


class PlantedDropPath(DropPath):
    """Stochastic depth at rate 0, where timm left an `nn.Identity` or None because the model's own rate is 0."""

    def __init__(self, replaces_none: bool) -> None:
        super().__init__(drop_prob=0.0)
        self.replaces_none = replaces_none


def plant_drop_paths(model: nn.Module) -> None:
    """Make every stochastic-depth place of the model exist. At rate 0 it computes nothing."""
    for parent in list(model.modules()):
        attributes = {**vars(parent), **parent._modules}
        for name, occupant in attributes.items():
            if DROP_PATH_NAME.fullmatch(name) and (occupant is None or type(occupant) is nn.Identity):
                setattr(parent, name, PlantedDropPath(occupant is None).train(parent.training))


def uproot_drop_paths(model: nn.Module) -> None:
    """Undo `plant_drop_paths`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, PlantedDropPath):
                continue
            if child.replaces_none:
                delattr(parent, name)  # None becomes a plain attribute again, not an empty submodule
                setattr(parent, name, None)
            else:
                setattr(parent, name, nn.Identity().train(parent.training))


def find_drop_paths(model: nn.Module) -> list[nn.Module]:
    """All stochastic-depth modules."""
    return [module for module in model.modules() if isinstance(module, DropPath)]


def find_dropouts(model: nn.Module) -> list[nn.Module]:
    """All dropouts after attention projections and in MLPs."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and name.rpartition(".")[2] in DROPOUT_NAMES
    ]
