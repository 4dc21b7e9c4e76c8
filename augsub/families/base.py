"""A family says where augmentations act in one class of models. This one serves every model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from augsub.families.modules import find_drop_paths, find_dropouts
from augsub.sites import ImageSite, ModuleSite, Site

DEFAULT_STRIDE = 32  # total stride of nearly all hierarchical models


class Family:
    """What is true of any model: it has an input, and perhaps stochastic-depth and dropout modules.

    A subclass adds the sites that its models have inside. All methods are called by `patch`, after
    the drop-path places were planted.
    """

    def sites(self, model: nn.Module) -> dict[str, Site]:
        """The model's sites by name; a site without modules is left out."""
        sites: dict[str, Site] = {"image": ImageSite(self.stride(model))}
        for name, modules in (("drop_path", find_drop_paths(model)), ("dropout", find_dropouts(model))):
            if modules:
                sites[name] = ModuleSite(modules)
        return sites

    def stride(self, model: nn.Module) -> int:
        """The model's total stride in pixels."""
        feature_info = getattr(model, "feature_info", None)
        return feature_info[-1]["reduction"] if isinstance(feature_info, list) and feature_info else DEFAULT_STRIDE

    def mask_token_width(self, model: nn.Module) -> int | None:
        """Width D of the mask token that `patch` must create, None if the family needs none."""
        return None

    def resized_state(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
        """Module attributes (module, name, value) with which the model takes another image size."""
        return iter(())


_FAMILIES: dict[type[nn.Module], Family] = {}


def register_family(*model_classes: type[nn.Module]):
    """Class decorator: the family serves these model classes and their subclasses."""

    def decorate(family: type[Family]) -> type[Family]:
        for model_class in model_classes:
            _FAMILIES[model_class] = family()
        return family

    return decorate


def family_of(model: nn.Module) -> Family:
    """The family registered for the nearest base class of the model, else the one for every model."""
    for model_class in type(model).__mro__:
        if model_class in _FAMILIES:
            return _FAMILIES[model_class]
    return Family()
