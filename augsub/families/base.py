"""A family says where augmentations act in one class of models. This one serves every model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from timm.layers import DropPath
from timm.models.efficientvit_msra import ResidualDrop
from torch import nn

from augsub.residual_branches import branches_of
from augsub.sites import Assignment, DropPathSite, ForeignModule, ImageSite, ImageSize, ModuleSite, Site

DROP_PATH_NAME = re.compile(r"(\w+_)?drop_path\d?")
DROPOUT_NAME = re.compile(r"(proj|out|mlp)_drop|drop\d?")  # not attention weights, positions or embeddings
NOT_IN_BLOCKS = re.compile(r"head|classifier|pre_logits|rel_pos|meta_mlp")  # nor networks of position biases


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is true of any model: it has an input, and perhaps stochastic-depth and dropout modules.

    A subclass adds the sites that its models have inside.

    Args:
        fixed_size: whether its models take images of their built size only.
    """

    fixed_size: bool = False

    def missing_modules(self, model: ForeignModule) -> Iterator[Assignment]:
        """Modules (parent, name, module) that the model would have with other rates; they compute nothing as they are.

        Stochastic depth at rate 0, where timm left an `nn.Identity` or None because the model's own rate is 0.
        """
        for block, name, occupant in drop_path_places(model):
            if not isinstance(occupant, DropPath):
                yield block, name, DropPath(0.0)

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        """The sites of a model without missing modules by name; a site without modules is left out."""
        drop_paths = [
            module
            for parent in model.modules()
            if has_residual(parent)
            for module in parent.children()
            if isinstance(module, (DropPath, ResidualDrop))
        ]
        dropouts = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout)
            and DROPOUT_NAME.fullmatch(name.rpartition(".")[2])
            and not NOT_IN_BLOCKS.search(name)
        ]
        sites: dict[str, Site] = {"image": ImageSite(self.stride(model), self.takes_other_sizes(model))}
        sites |= {"drop_path": DropPathSite(drop_paths, *branches_of(model, drop_paths))} if drop_paths else {}
        return sites | ({"dropout": ModuleSite(dropouts)} if dropouts else {})

    def stride(self, model: ForeignModule) -> int:
        """The model's total stride in pixels."""
        feature_info = getattr(model, "feature_info", None)
        if isinstance(feature_info, list) and feature_info:
            return int(feature_info[-1]["reduction"])
        return 32  # of nearly all hierarchical models

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        """Whether the sub-model may see images of another size than the main model."""
        return not self.fixed_size

    def mask_token_width(self, model: ForeignModule) -> int | None:
        """Width D of the mask token that `patch` must create in `model`, None if the family needs none."""
        return None

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        """Module attributes (module, name, value) with which `model` takes images of `image_size`, (H, W)."""
        return iter(())


FAMILIES: dict[str, Family] = {}  # by the names of the model classes that they serve


def register_family(family: Family, *model_classes: str) -> None:
    """Let the family serve these model classes and their subclasses.

    Args:
        family: the family.
        model_classes: full names ("my_package.models.MyModel"), those of timm without "timm.models.".
    """
    FAMILIES.update(dict.fromkeys(model_classes, family))


def family_of(model: ForeignModule) -> Family:
    """The family registered for the nearest base class of the model, else the one for every model."""
    for model_class in type(model).__mro__:
        name = f"{model_class.__module__}.{model_class.__qualname__}".removeprefix("timm.models.")
        if name in FAMILIES:
            return FAMILIES[name]
    return Family()


def drop_path_places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module | None]]:
    """Where stochastic depth is or could be: (block, attribute, what is there: a module or None)."""
    return [
        (parent, name, occupant)
        for parent in model.modules()
        for name, occupant in {**vars(parent), **parent._modules}.items()
        if DROP_PATH_NAME.fullmatch(name) and (occupant is None or isinstance(occupant, (DropPath, nn.Identity)))
    ]


def has_residual(block: nn.Module) -> bool:
    """Whether a block adds its input to its branch, by the attributes with which timm's blocks say that they do not.

    Some call their drop path all the same: without a residual connection it would erase the image.
    """
    if hasattr(block, "no_skip"):
        return not block.no_skip  # of Xception, whose shortcut is None where it is the input itself
    flags = ("has_skip", "residual", "use_shortcut", "add_identity")
    return all(getattr(block, flag, True) for flag in flags) and getattr(block, "shortcut", block) is not None
