"""The whole of timm: the table of docs/model_support.md, one smallest model for each (file, class) of timm's registry.

`python tests/zoo.py` prints it for the installed timm: it builds all models without weights, which takes minutes. The
tests take the models from the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import timm

import augsub
from engine.text import markdown_table
from models.build import build_on_meta
from tests.skipping import can_skip

PAGE = Path(__file__).parents[1] / "docs" / "model_support.md"


@dataclass(frozen=True)
class ZooRow:
    """All models that one timm file makes of one class.

    Attributes:
        file: timm's file without ".py".
        num_models: how many models share file and class.
        smallest: the one of fewest parameters.
        params: its parameters, in millions.
        sites: where each augmentation acts in it, by name; "-" is nowhere.
        skips: whether its paths can be skipped.
    """

    file: str
    model_class: str
    num_models: int
    smallest: str
    params: float
    sites: dict[str, str]
    skips: bool


def load_rows() -> list[ZooRow]:
    """The rows of the page, in alphabetical order."""
    header, _, *lines = re.findall(r"^\|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    names = [name.strip() for name in header.split("|")][5:-1]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [
        ZooRow(
            file, model_class, int(count), smallest, float(params), dict(zip(names, sites, strict=True)), skips == "yes"
        )
        for file, model_class, count, smallest, params, *sites, skips in rows
    ]


def print_table() -> None:
    """The table for the installed timm."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in timm.list_models():
        model = build_on_meta(name)
        file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        size = sum(parameter.numel() for parameter in model.parameters())
        found.setdefault((file, type(model).__name__), []).append((size, name))
    rows, augmentations = [], augsub.list_augmentations()
    for (file, model_class), models in sorted(found.items()):
        params, smallest = min(models)
        model = augsub.patch(build_on_meta(smallest))
        sites, skips = augsub.supports(model), "yes" if can_skip(model) else "-"
        known = [file, model_class, len(models), smallest, f"{params / 1e6:.2f}"]
        rows.append([*known, *(sites.get(name, "-") for name in augmentations), skips])
    counts = f"{sum(row[2] for row in rows)} models of {len(rows)} classes"
    print(f"timm {timm.__version__}: {counts}, with the smallest model of each.\n")
    print(
        markdown_table(["file", "class", "models", "smallest", "parameters, M", *augmentations, "skipped paths"], rows)
    )


if __name__ == "__main__":
    print_table()
