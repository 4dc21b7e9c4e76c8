"""The picture of what sub-models see: a row per model and image, a column per sub-model."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

import augsub
from engine import atomic
from engine.errors import writing_errors
from engine.figure import BLUE, VERMILION
from models.recording import Dropping, Fate
from models.rendering import render, render_main
from models.seen import Seen

PANEL, GAP, LEFT, TITLE, CAPTION, LEGEND_MARGIN, LEGEND_ROW = 1.5, 0.2, 0.45, 0.4, 0.4, 0.13, 0.17  # inches
SMALL = 7.5  # points
DPI = 130
KEPT, DROPPED = BLUE, "#FFFFFF"
CROP_EDGE = VERMILION
HATCH, HATCH_COLOUR = "/////", "0.75"  # over what is removed, which would be hard to see on a pale image
FINE = 8  # hatched areas end within 1/8 pixel of their place
ACTIVATIONS = (8, 2)  # of each dropout that are drawn, rows and columns
LEGEND_ENTRY = 2.1  # inches, the longest one
FATES = {
    Fate.REMOVED: ("removed: nothing is computed for it", {"facecolor": "#F4F4F4", "hatch": HATCH}),
    Fate.REPLACED: ("replaced by the learned mask token", {}),
    Fate.ZEROED: ("set to zero", {}),
}


@dataclass(frozen=True)
class Row:
    """One image in one model.

    Attributes:
        label: what stands on its left.
        samples: which samples of the batch are this image; the first is drawn, paths and activations drop in all.
        images: what the main model sees, (B, C, H, W).
        seen: what each sub-model sees, or None where the model does not offer the augmentation.
        mean, std: of each channel, as `models.rendering.render` takes them.
    """

    label: str
    samples: slice
    images: Tensor
    seen: Sequence[Seen | None]
    mean: Sequence[float] | None
    std: Sequence[float] | None


DrawPanel = Callable[[Axes, Row, Seen], None]


def draw(rows: Sequence[Row], sub_models: Sequence[augsub.SubModelAugmentation], path: Path) -> None:
    """Draw the rows and write the PNG file."""
    panels = [(index, part) for index, sub_model in enumerate(sub_models) for part in _panels_of(sub_model)]
    legend = _legend_entries(rows, sub_models)
    figure, axes, legend_columns = _grid_of_axes(len(rows), 1 + len(panels), len(legend))
    for row, (main, *others) in zip(rows, axes, strict=True):
        _show_image(main, render_main(row.images[row.samples], row.mean, row.std)[0])
        main.set_xlabel("{} × {} px".format(*row.images.shape[2:]), fontsize=SMALL)  # noqa: RUF001
        main.set_ylabel(row.label, fontsize=SMALL)
        for panel, (index, draw_panel) in zip(others, panels, strict=True):
            if row.seen[index] is None:
                _say_not_offered(panel)
            else:
                draw_panel(panel, row, row.seen[index])
    titles = ["main model", *(str(sub_models[index]).replace(" + ", "\n+ ") for index, _ in panels)]
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    figure.legend(handles=legend, loc="lower center", ncols=legend_columns, frameon=False, fontsize=8)
    _save(figure, path)


def _grid_of_axes(rows: int, columns: int, legend_entries: int) -> tuple[Figure, np.ndarray, int]:
    """Square panels of equal size, (rows, columns), with room for what stands around them; columns of the legend."""
    width = LEFT + columns * (PANEL + GAP)
    legend_columns = max(1, int(width / LEGEND_ENTRY))
    legend_height = LEGEND_MARGIN + LEGEND_ROW * math.ceil(legend_entries / legend_columns)
    height = TITLE + rows * (PANEL + CAPTION) + legend_height
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(width, height),
        gridspec_kw={
            "left": LEFT / width,
            "right": 1 - GAP / width,
            "top": 1 - TITLE / height,
            "bottom": (legend_height + CAPTION) / height,
            "wspace": GAP / PANEL,
            "hspace": CAPTION / PANEL,
        },
    )
    return figure, axes, legend_columns


def _panels_of(augmentation: augsub.SubModelAugmentation) -> list[DrawPanel]:
    """What shows the augmentation: the image, its paths, its activations, or several of them."""
    sites = _sites_of(augmentation)
    return [
        *([_draw_image] if sites - {"drop_path", "dropout"} else []),
        *([_draw_paths] if "drop_path" in sites else []),
        *([_draw_activations] if "dropout" in sites else []),
    ]


def _sites_of(augmentation: augsub.SubModelAugmentation) -> set[str]:
    return {site for member in augmentation.members for site in member.sites}


def _say_not_offered(axes: Axes) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, "not offered\nby this model", ha="center", va="center", fontsize=8, color="0.4")


def _draw_image(axes: Axes, row: Row, seen: Seen) -> None:
    sample = row.samples.start
    _show_image(axes, render(seen, row.mean, row.std)[sample])
    axes.set_xlabel(_caption(seen, sample), fontsize=SMALL)
    removed = (seen.fates[sample] == Fate.REMOVED).repeat_interleave(FINE, 0).repeat_interleave(FINE, 1)
    if removed.any():
        extent = axes.images[0].get_extent()
        levels, hatches = [0.5, 1.5], [HATCH]
        axes.contourf(
            removed.cpu().numpy(), levels, hatches=hatches, colors="none", extent=extent, origin="upper"
        ).set_edgecolor(HATCH_COLOUR)
    top, left, height, width = seen.crops[sample].tolist()
    if (height, width) != tuple(seen.images.shape[2:]):
        frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=CROP_EDGE, linewidth=1.5)
        axes.add_patch(frame)


def _show_image(axes: Axes, picture: Tensor) -> None:
    axes.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.7")


def _caption(seen: Seen, sample: int) -> str:
    """How much is left, in the numbers of the forward."""
    facts = []
    if seen.inputs.shape != seen.images.shape:
        facts.append("{} × {} px".format(*seen.inputs.shape[2:]))  # noqa: RUF001
    for hidden in seen.hidden:
        cells = hidden.cells[sample]
        if hidden.fate == Fate.REMOVED:
            facts.append(f"{int((~cells).sum())} of {cells.numel()} tokens")
        else:
            facts.append(f"{cells.float().mean():.0%} {hidden.fate.name.lower()}")
    return "\n".join(facts) or "all of it"


def _draw_paths(axes: Axes, row: Row, seen: Seen) -> None:
    """Pale where a module drops parts of an image, each for itself."""
    shares = torch.stack([path.share[row.samples] for path in seen.paths], dim=1)
    _show_kept(axes, shares, row, f"{len(seen.paths)} residual branches", seen.paths)
    axes.set_xticks(np.arange(0.5, shares.shape[1]), minor=True)
    axes.set_yticks(np.arange(0.5, shares.shape[0]), minor=True)
    axes.grid(which="minor", color="0.8", linewidth=0.5)
    axes.tick_params(which="minor", length=0, pad=0)


def _draw_activations(axes: Axes, row: Row, seen: Seen) -> None:
    """A part of the activations of each dropout."""
    height, width = ACTIVATIONS
    noted = torch.stack([dropout.kept[row.samples, : height * width] for dropout in seen.dropouts], dim=1)
    mosaic = noted.unflatten(-1, ACTIVATIONS).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    _show_kept(axes, mosaic, row, f"activations of {len(seen.dropouts)} dropouts", seen.dropouts)


def _show_kept(axes: Axes, kept: Tensor, row: Row, label: str, droppings: Sequence[Dropping]) -> None:
    """A column per module in the order of the forward, a row per sample."""
    colours = LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT])
    axes.imshow(kept.cpu().numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    share = torch.stack([dropping.share[row.samples] for dropping in droppings]).mean()
    axes.set_xlabel(f"{label}\n{share:.0%} kept", fontsize=SMALL)
    axes.set_ylabel(f"{row.samples.stop - row.samples.start} samples", fontsize=SMALL, labelpad=1)
    axes.spines[:].set_color("0.7")


def _legend_entries(rows: Sequence[Row], sub_models: Sequence[augsub.SubModelAugmentation]) -> list[Patch]:
    """What occurs in the picture."""
    found = _colours(rows)
    entries = [
        Patch(label=label, **{"facecolor": found[fate], **style})
        for fate, (label, style) in FATES.items()
        if fate in found
    ]
    if any(_sites_of(augmentation) & {"drop_path", "dropout"} for augmentation in sub_models):
        entries += [Patch(facecolor=KEPT, label="kept"), Patch(facecolor=DROPPED, label="dropped")]
    for entry in entries:
        entry.set_edgecolor(HATCH_COLOUR)
    return entries


def _colours(rows: Sequence[Row]) -> dict[int, tuple[float, ...]]:
    """The fates in the picture, each with the colour of a pixel that it met."""
    colours = {}
    for row in rows:
        for seen in filter(None, row.seen):
            pictures = render(seen, row.mean, row.std).permute(0, 2, 3, 1) / 255
            colours |= {fate: tuple(pictures[seen.fates == fate][0].tolist()) for fate in seen.fates.unique().tolist()}
    return colours


def _save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with writing_errors(path), atomic.new_content(path) as file:
        picture.save(file, "PNG", optimize=True)
