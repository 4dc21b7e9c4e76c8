"""JSON that every reader takes: the standard (RFC 8259) has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(content: Any, indent: int | None = None) -> str:
    """The text of dictionaries, lists and plain values; null stands for a number that is not finite."""
    return json.dumps(_with_null(content), indent=indent, allow_nan=False)


def with_nan(record: Mapping[str, float | None]) -> dict[str, float]:
    """Named numbers that were read back: NaN stands for null again."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def _with_null(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _with_null(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
