"""Which augmentations timm's models offer, and where they act in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

import augsub
from models.build import build_on_meta

NOT_OFFERED = "-"


def support_of(name: str) -> dict[str, str]:
    """`augsub.supports` for a timm model by name, without memory for its weights."""
    return augsub.supports(build_on_meta(name))


def support_table(columns: Sequence[str], rows: Sequence[tuple[Sequence[object], Mapping[str, str]]]) -> str:
    """Markdown: what is known of each model, then the site of every registered augmentation."""
    augmentations = augsub.list_augmentations()
    cells = [[*known, *(support.get(name, NOT_OFFERED) for name in augmentations)] for known, support in rows]
    return tabulate(cells, headers=[*columns, *augmentations], tablefmt="github", disable_numparse=True)
