"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns between rules."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}   {value}" for name, value in rows]
    rule = "-" * (max(map(len, lines)) + 2)
    return "\n".join([rule, *lines, rule])
