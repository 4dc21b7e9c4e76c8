"""Whether a saved state is built like the one that it is to replace: intact files may hold anybody's content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def differences(own: Any, saved: Any, place: str) -> Iterator[str]:
    """What of `saved` does not have the type or the size of `own`.

    Empty dictionaries and lists and None say nothing about what replaces them; entries may be added.
    """
    if own is None:
        return
    if _kind(own) != _kind(saved):
        yield f"{place} is of type {type(saved).__name__}, not {type(own).__name__}"
    elif isinstance(own, dict):
        yield from (f"{place}.{key} is missing" for key in own.keys() - saved.keys())
        for key in own.keys() & saved.keys():
            yield from differences(own[key], saved[key], f"{place}.{key}")
    elif isinstance(own, list | tuple):
        for index, (one, other) in enumerate(zip(own, saved, strict=False)):
            yield from differences(one, other, f"{place}.{index}")
    elif isinstance(own, Tensor) and own.shape != saved.shape:
        yield f"{place} has shape {tuple(saved.shape)}, not {tuple(own.shape)}"


def check_alike(own: Any, saved: Any, place: str) -> None:
    """Raise ValueError with the first difference."""
    for difference in differences(own, saved, place):
        raise ValueError(difference)


def _kind(value: Any) -> type:
    """The type; numbers are alike, and all kinds of tensors and of dictionaries."""
    for kind in (Tensor, dict):
        if isinstance(value, kind):
            return kind
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)
