"""A family says where augmentations act in one class of models. This one serves every model."""

from __future__ import annotations

from collections.abc import Iterator

from augsub.families.modules import find_drop_paths, find_dropouts, plant_drop_paths, uproot_drop_paths
from augsub.sites import Assignment, ForeignModule, ImageSite, ImageSize, ModuleSite, Site

DEFAULT_STRIDE = 32  # total stride of nearly all hierarchical models


class Family:
    """What is true of any model: it has an input, and perhaps stochastic-depth and dropout modules.

    A subclass adds the sites that its models have inside.
    """

    def plant(self, model: ForeignModule) -> None:
        """Make places exist that the model would have with other rates; the main model stays what it is."""
        plant_drop_paths(model)

    def uproot(self, model: ForeignModule) -> None:
        """Undo what `plant` did to `model`."""
        uproot_drop_paths(model)

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        """The sites of a planted model by name; a site without modules is left out."""
        sites: dict[str, Site] = {"image": ImageSite(self.stride(model), self.takes_other_sizes(model))}
        for name, modules in (("drop_path", find_drop_paths(model)), ("dropout", find_dropouts(model))):
            if modules:
                sites[name] = ModuleSite(modules)
        return sites

    def stride(self, model: ForeignModule) -> int:
        """The model's total stride in pixels."""
        feature_info = getattr(model, "feature_info", None)
        if isinstance(feature_info, list) and feature_info:
            return int(feature_info[-1]["reduction"])
        return DEFAULT_STRIDE

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        """Whether the sub-model may see images of another size than the main model."""
        return True

    def mask_token_width(self, model: ForeignModule) -> int | None:
        """Width D of the mask token that `patch` must create in `model`, None if the family needs none."""
        return None

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        """Module attributes (module, name, value) with which `model` takes images of `image_size`, (H, W)."""
        return iter(())


_FAMILIES: dict[str, Family] = {}
EVERY_MODEL = Family()


def register_family(family: Family, *model_classes: str) -> None:
    """Let the family serve these model classes and their subclasses.

    Args:
        family: the family.
        model_classes: full names ("my_package.models.MyModel"), those of timm without "timm.models.".
    """
    _FAMILIES.update(dict.fromkeys(model_classes, family))


def registered_classes() -> tuple[str, ...]:
    """Names of all model classes that a family was registered for."""
    return tuple(_FAMILIES)


def family_of(model: ForeignModule) -> Family:
    """The family registered for the nearest base class of the model, else the one for every model."""
    for model_class in type(model).__mro__:
        name = f"{model_class.__module__}.{model_class.__qualname__}".removeprefix("timm.models.")
        if name in _FAMILIES:
            return _FAMILIES[name]
    return EVERY_MODEL
