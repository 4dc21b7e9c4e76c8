"""The registry of sub-model augmentations, and `build`, which makes one from its description."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from augsub.augmentation import Compose, SubModelAugmentation
from augsub.named_registry import NamedRegistry

AugmentationClass = TypeVar("AugmentationClass", bound=type[SubModelAugmentation])
AugmentationSpec = str | Mapping[str, Any] | SubModelAugmentation | Sequence[Any]  # a sequence of these


AUGSUB_REGISTRY = NamedRegistry("AUGSUB", "augmentation", SubModelAugmentation)


def register(name: str) -> Callable[[AugmentationClass], AugmentationClass]:
    """Class decorator: make an augmentation known under `name`.

    Raises:
        TypeError: if the class is no `SubModelAugmentation` or names no site in `sites`.
        ValueError: if the name is taken.
    """

    def decorate(augmentation: AugmentationClass) -> AugmentationClass:
        sites = getattr(augmentation, "sites", ("of something else",))  # which the registry refuses
        if not sites or isinstance(sites, str):
            raise TypeError(f"{augmentation.__name__} must name its sites in a tuple, for example sites = ('tokens',)")
        AUGSUB_REGISTRY.register_as(name)(augmentation)
        augmentation.name = name
        return augmentation

    return decorate


def list_augmentations() -> list[str]:
    """Names of all registered augmentations, sorted."""
    return AUGSUB_REGISTRY.names()


def build(spec: AugmentationSpec, **arguments: Any) -> SubModelAugmentation:
    """Make an augmentation from its description.

    Args:
        spec: a registered name, a mapping with `name` and the augmentation's arguments, a sequence
            of those (composed, applied in order), or an augmentation (returned as it is).
        arguments: the augmentation's arguments if `spec` is a name, for example ``ratio=0.5``; None leaves one out.

    Raises:
        ValueError: unknown name (the closest one is named), missing or unknown argument, argument
            out of range, or `arguments` beside anything but a name.
        TypeError: `spec` is of another type.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if isinstance(spec, str):
        spec = {"name": spec, **arguments}
    elif arguments:
        raise ValueError(f"{', '.join(arguments)} can only be given beside an augmentation's name, not beside {spec!r}")
    if isinstance(spec, SubModelAugmentation):
        return spec
    if isinstance(spec, Sequence):
        return Compose([build(member) for member in spec])
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"an augmentation is a name, a mapping with 'name', a list of those or an instance, not {spec!r}"
        )
    name, given = spec.get("name"), {key: value for key, value in spec.items() if key != "name"}
    if not isinstance(name, str):
        raise ValueError(f"augmentation {dict(spec)!r} has no 'name'; known: {', '.join(list_augmentations())}")
    augmentation: type[SubModelAugmentation] = AUGSUB_REGISTRY.get(name)
    signature = inspect.signature(augmentation)
    try:
        signature.bind(**given)
    except TypeError as mismatch:
        raise ValueError(f"{name}: {mismatch}; its arguments are {signature}") from mismatch
    return augmentation(**given)
