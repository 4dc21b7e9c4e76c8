"""Tables, and sizes in them."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def text_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns between rules."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}   {value}" for name, value in rows]
    rule = "-" * (max(map(len, lines)) + 2)
    return "\n".join([rule, *lines, rule])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of GitHub's Markdown, its cells as they are."""
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def readable(nbytes: int) -> str:
    """Bytes for people: "2.528 GB", 10^9 bytes."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3f} MB" if nbytes else "0"
