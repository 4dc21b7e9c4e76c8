"""Registries of classes by name: augmentations, lessons and objectives have one each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fvcore.common.registry import Registry

Registered = TypeVar("Registered", bound=type)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name nearest to a wrong one, as the end of a message; empty if none is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


class NamedRegistry(Registry):  # type: ignore[misc]  # fvcore is untyped
    """fvcore's registry, of the subclasses of one class, which says what is known.

    Args:
        name: of the registry itself.
        what: one of the registered, in words.
        base: the class.
    """

    def __init__(self, name: str, what: str, base: type) -> None:
        super().__init__(name)
        self._what, self._base = what, base

    def get(self, name: str) -> Any:
        """The class registered under `name`; ValueError with the known names otherwise."""
        if name not in self:
            nearest = did_you_mean(str(name), dict(self))
            raise ValueError(f"unknown {self._what} {name!r}{nearest}; known: {', '.join(self.names()) or 'none'}")
        return super().get(name)

    def names(self) -> list[str]:
        """The name of each registered class, sorted."""
        return sorted(name for name, _ in self)

    def register_as(self, name: str) -> Callable[[Registered], Registered]:
        """Class decorator: make a class known under a name.

        Raises:
            TypeError: if it is no subclass of the registry's class.
            ValueError: if the name is taken.
        """

        def decorate(registered: Registered) -> Registered:
            if not (isinstance(registered, type) and issubclass(registered, self._base)):
                raise TypeError(f"{registered!r} cannot be registered: it is no subclass of {self._base.__name__}")
            if name in self:
                raise ValueError(f"{self._what} {name!r} is registered already")
            self._do_register(name, registered)
            return registered

        return decorate
