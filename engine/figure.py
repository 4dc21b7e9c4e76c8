"""What all pictures share: colours that colour-blind readers can tell apart, and how a figure becomes a file."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from engine import atomic
from engine.errors import input_errors, writing_errors

plt.rcParams["text.parse_math"] = False  # a $ in the name of a run or a class is a $
# Okabe and Ito's palette; their yellow is too pale for lines
OKABE_ITO = BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure in the format that the file's name ends in, whole or not at all, and close it.

    Raises:
        InputError: matplotlib does not know the format.
        RunError: the file cannot be written.
    """
    try:
        with input_errors(str(path)), writing_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.new_content(path) as file:
                figure.savefig(file, dpi=dpi, format=path.suffix.removeprefix(".") or None)
    finally:
        plt.close(figure)
