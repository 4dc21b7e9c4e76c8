"""Values as text, and back: names of files, JSON, tables, sizes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

LOCAL_MODEL = "local-dir:"  # timm's prefix for a folder in place of a model's name


def readable_name(name: str) -> str:
    """A file's name as text: of bytes that are not UTF-8, which Python keeps as lone surrogates, escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def expanded(path: str) -> str:
    """A path, or a model's name that holds one, with the home folder that `~` or `~user` means."""
    prefix = LOCAL_MODEL if path.startswith(LOCAL_MODEL) else ""
    return prefix + os.path.expanduser(path.removeprefix(prefix))


def to_json(content: Any, indent: int | None = None) -> str:
    """The text of dictionaries, lists and plain values, which every reader takes.

    The standard (RFC 8259) has no NaN and no infinity: null stands for them.
    """
    return json.dumps(_with_null(content), indent=indent, allow_nan=False)


def to_csv(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None) -> str:
    """Rows as lines of CSV under a header.

    Args:
        columns: in their order, of which a row may lack some; None: those of the first row.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(rows[0] if columns is None else columns)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def with_nan(record: Mapping[str, float | None]) -> dict[str, float]:
    """Named numbers that were read back: NaN stands for null again."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def _with_null(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _with_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def text_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns between rules."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}   {value}" for name, value in rows]
    rule = "-" * (max(map(len, lines)) + 2)
    return "\n".join([rule, *lines, rule])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of GitHub's Markdown, its cells as they are."""
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def readable_size(nbytes: int) -> str:
    """Bytes for people: "2.528 GB", 10^9 bytes."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3f} MB" if nbytes else "0"


def readable_time(seconds: float) -> str:
    """Seconds for people: "7 min 20 s", the two largest units."""
    parts, rest = [], round(seconds)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        parts += [f"{count:,} {unit}"] * bool(count or parts)
    return " ".join(parts[:2]) or "0 s"
