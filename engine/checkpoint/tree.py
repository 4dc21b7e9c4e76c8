"""A state as nested dictionaries, taken apart into tensors and plain values, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]  # the keys that lead to a value


def split(state: dict[Any, Any]) -> tuple[dict[Path, Tensor], dict[Any, Any]]:
    """Tensors by path, and the same dictionaries without them. Lists and tuples are plain values."""
    tensors: dict[Path, Tensor] = {}

    def plain_part(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
        plain = {}
        for key, value in content.items():
            if isinstance(value, Tensor):
                tensors[(*path, key)] = value
            else:
                plain[key] = plain_part(value, (*path, key)) if isinstance(value, dict) else value
        return plain

    return tensors, plain_part(state, ())


def join(tensors: dict[Path, Tensor], plain: dict[Any, Any]) -> dict[Any, Any]:
    """The state that `split` took apart, in `plain`."""
    for (*path, key), tensor in tensors.items():
        content = plain
        for step in path:
            content = content.setdefault(step, {})
        content[key] = tensor
    return plain


def map_tensors(change: Callable[[Path, Tensor], Tensor], state: dict[Any, Any]) -> dict[Any, Any]:
    """A state with every tensor changed."""
    tensors, plain = split(state)
    return join({path: change(path, tensor) for path, tensor in tensors.items()}, plain)
