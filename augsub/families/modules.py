"""Stochastic-depth and dropout modules of a model, found by the names that timm gives them."""

from __future__ import annotations

import re

from timm.layers import DropPath
from timm.models.efficientvit_msra import ResidualDrop
from torch import nn

DROP_PATH_NAME = re.compile(r"(\w+_)?drop_path\d?")
DROPOUT_NAME = re.compile(r"(proj|out|mlp)_drop|drop\d?")  # not attention weights, positions or embeddings
NOT_IN_BLOCKS = re.compile(r"head|classifier|pre_logits|rel_pos|meta_mlp")  # nor networks of position biases


class PlantedDropPath(DropPath):
    """Stochastic depth at rate 0, where timm left an `nn.Identity` or None because the model's own rate is 0."""

    def __init__(self, replaces_none: bool) -> None:
        super().__init__(drop_prob=0.0)
        self.replaces_none = replaces_none


def drop_path_places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module | None]]:
    """Where stochastic depth is or could be: (block, attribute, what is there: a module or None)."""
    return [
        (parent, name, occupant)
        for parent in model.modules()
        for name, occupant in {**vars(parent), **parent._modules}.items()
        if DROP_PATH_NAME.fullmatch(name) and (occupant is None or isinstance(occupant, (DropPath, nn.Identity)))
    ]


def plant_drop_paths(model: nn.Module) -> None:
    """Make every stochastic-depth place of the model exist. At rate 0 it computes nothing."""
    for parent, name, occupant in drop_path_places(model):
        if not isinstance(occupant, DropPath):
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


def has_residual(block: nn.Module) -> bool:
    """Whether a block adds its input to its branch, by the attributes with which timm's blocks say that they do not.

    Some call their drop path all the same: without a residual connection it would erase the image.
    """
    if hasattr(block, "no_skip"):
        return not block.no_skip  # of Xception, whose shortcut is None where it is the input itself
    has_skip = getattr(block, "has_skip", True) and getattr(block, "residual", True)
    return has_skip and getattr(block, "shortcut", block) is not None


def find_drop_paths(model: nn.Module) -> list[nn.Module]:
    """All stochastic-depth modules of blocks that have a residual connection."""
    return [
        module
        for parent in model.modules()
        if has_residual(parent)
        for module in parent.children()
        if isinstance(module, (DropPath, ResidualDrop))
    ]


def find_dropouts(model: nn.Module) -> list[nn.Module]:
    """All dropouts after attention projections and in MLPs."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout)
        and DROPOUT_NAME.fullmatch(name.rpartition(".")[2])
        and not NOT_IN_BLOCKS.search(name)
    ]
