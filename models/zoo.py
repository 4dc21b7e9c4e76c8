"""The whole of timm: one smallest model for each (file, class) of its registry."""

from __future__ import annotations

import csv
from dataclasses import astuple, dataclass
from pathlib import Path

import timm

from models.build import build_on_meta

TABLE = Path(__file__).with_name("zoo.csv")  # written by `python -m models.zoo`


@dataclass(frozen=True)
class ZooRow:
    """All models that one timm file makes of one class.

    Attributes:
        file: timm's file without ".py".
        model_class: the class's name.
        smallest: the model of fewest parameters.
        params: its number of parameters.
        num_models: how many models share file and class.
    """

    file: str
    model_class: str
    smallest: str
    params: int
    num_models: int


def zoo_rows() -> list[ZooRow]:
    """One row per (file, class), in alphabetical order. Builds every model once, on the meta device."""
    rows: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in timm.list_models():
        model = build_on_meta(name)
        file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        params = sum(parameter.numel() for parameter in model.parameters())
        rows.setdefault((file, type(model).__name__), []).append((params, name))
    return [
        ZooRow(file, model_class, min(found)[1], min(found)[0], len(found))
        for (file, model_class), found in sorted(rows.items())
    ]


def load_rows() -> list[ZooRow]:
    """The rows as they were written for the timm version that the project is tested with."""
    with TABLE.open(newline="") as file:
        return [
            ZooRow(file, model_class, smallest, int(params), int(num_models))
            for file, model_class, smallest, params, num_models in csv.reader(file)
        ]


if __name__ == "__main__":
    with TABLE.open("w", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(astuple(row) for row in zoo_rows())
