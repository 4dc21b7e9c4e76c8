"""Hooks of the user's own: a plugin registers their classes, the configuration names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from augsub.named_registry import NamedRegistry
from engine.train_loop import HookBase

HOOK_REGISTRY = NamedRegistry("HOOK", "hook", HookBase)  # @HOOK_REGISTRY.register() above a subclass of HookBase


def build_own_hooks(descriptions: Sequence[Any]) -> list[HookBase]:
    """Make hooks from mappings with the `name` of a registered class and its arguments.

    Raises:
        ValueError: an unknown name, or a description without one.
        TypeError: arguments that the class does not take, or a class that is no hook.
    """
    return [_build(description) for description in descriptions]


def _build(description: Any) -> HookBase:
    if not isinstance(description, Mapping) or "name" not in description:
        raise ValueError(f"{description!r}: allowed is a mapping with the name of a hook, and its arguments")
    arguments = {**description}
    name = arguments.pop("name")
    hook = HOOK_REGISTRY.get(name)(**arguments)
    if not isinstance(hook, HookBase):
        raise TypeError(f"{name} is no subclass of engine.train_loop.HookBase")
    return hook
