"""The picture of what sub-models see: models with images for them, a row for each image, a column per sub-model."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils.data import default_collate

import augsub
from engine import atomic
from engine.config import Config
from engine.data.files import images_below, natural_order
from engine.data.images import UnreadableImage, decode
from engine.data.source import IMAGENET, DataSource
from engine.data.transforms import Delivery, Normalise, build_transform, normalisation
from engine.defaults import create_configured_model
from engine.errors import InputError, first_line, input_errors, writing_errors
from engine.figure import BLUE, VERMILION
from engine.text import readable_name
from models.pictures import PixelState, Recording, record, render, render_main

NamedImage = tuple[str, Tensor]  # normalised, (C, H, W)
BUNDLED = "flower.jpg"  # with scikit-learn
SAMPLES = 6  # draws for each image
SHOWN = 3  # images of a configuration's data, or of the user's
PANEL, GAP, LEFT, TITLE, CAPTION, LEGEND_MARGIN, LEGEND_ROW = 1.5, 0.2, 0.45, 0.4, 0.4, 0.13, 0.17  # inches
LEGEND_ENTRY = 2.1  # inches, the longest one
SMALL = 7.5  # points
DPI = 130
DROPPED, KEPT = "#FFFFFF", BLUE
HATCH, HATCH_COLOUR = "/////", "0.75"  # over what is removed, which would be hard to see on a pale image
FINE = 8  # hatched areas end within 1/8 pixel of their place
ACTIVATIONS = (8, 2)  # of each dropout that are drawn, rows and columns
# of the legend: what became of pixels, in the order of `PixelState`, and of paths and activations
LABELS = (
    "removed: nothing is computed for it", "replaced by the learned mask token", "set to zero", "kept", "dropped"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One image in one model.

    Attributes:
        name, number: of the image; the number, counted in its model, adds to the seed.
        images: the same one for each draw, normalised, (SAMPLES, C, H, W).
        mean, std: of each channel, as it was normalised, if known.
    """

    model_name: str
    model: nn.Module
    name: str
    number: int
    images: Tensor
    mean: Sequence[float] | None
    std: Sequence[float] | None


def rows_of(config: Config, source: DataSource, files: Sequence[Path]) -> list[Row]:
    """The model of a complete configuration, with images of its data or the user's."""
    model = augsub.patch(create_configured_model(config, source))
    if source is not IMAGENET and not files:
        images, (mean, std) = _held_out_images(config, source), normalisation(config)
    else:
        images, mean, std = _photographs(files, config), config.transform.mean, config.transform.std
        if source.in_chans != len(mean):
            grey = [(name, image.mean(dim=0, keepdim=True)) for name, image in images]
            images, mean, std = [(name, image.expand(source.in_chans, -1, -1)) for name, image in grey], None, None
    return [
        Row(config.model.name, model, name, number, image.expand(SAMPLES, -1, -1, -1), mean, std)
        for number, (name, image) in enumerate(images)
    ]


def _held_out_images(config: Config, source: DataSource) -> list[NamedImage]:
    """A few held-out images, from the first to the last."""
    deliver = Delivery(config, torch.device("cpu"), is_training=False)
    indices = _evenly(range(len(source.held_out)))
    try:
        images, _ = deliver(*default_collate([source.held_out[index] for index in indices]))
    except UnreadableImage as error:
        name, reason = error.args
        raise InputError(f"{name} cannot be read: {reason}") from error
    return [(f"held-out image {index}", image) for index, image in zip(indices, images, strict=True)]


def _photographs(files: Sequence[Path], config: Config) -> list[NamedImage]:
    """The user's image files, or the bundled one, as the main model sees them in evaluation."""
    to_bytes = build_transform(config, is_training=False)
    normalise = Normalise(config.transform.mean, config.transform.std)
    images = [] if files else [(BUNDLED, Image.fromarray(load_sample_image(BUNDLED)))]
    for file in files:
        try:
            with file.open("rb") as opened:
                images.append((readable_name(file.name), decode(opened)))
        except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
            raise InputError(f"--images {file}: cannot be read: {first_line(error)}") from error
    return [(name, normalise(to_bytes(image))) for name, image in images]


def chosen(paths: Sequence[Path]) -> list[Path]:
    """A few of all image files, and of those in folders at any depth."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(images_below(path, Counter()), key=natural_order) if path.is_dir() else [path]
        found = [Path(file) for file in inside]
        if not found:
            raise InputError(f"--images {path}: the folder holds no image")
        files += found
    if len(files) > SHOWN:
        print(f"--images: {SHOWN} of {len(files):,} images are drawn, evenly chosen")
    return _evenly(files)


def _evenly(items: Sequence[Any]) -> list[Any]:
    """A few of the items, from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(SHOWN, len(items))).round().astype(int)
    return [items[place] for place in places]


DrawPanel = Callable[[Axes, Row, Recording], dict[str, Patch]]  # returns what it adds to the legend


def draw(
    rows: Sequence[Row], sub_models: Sequence[augsub.SubModelAugmentation], seed: int, may_lack: bool, path: Path
) -> None:
    """Record and draw the rows and write the PNG file, of 256 colours: a third of the size.

    Args:
        may_lack: leave open what a model does not offer, which is an error otherwise.
    """
    panels = [_panels_of(sub_model) for sub_model in sub_models]
    figure, axes = plt.subplots(len(rows), 1 + sum(map(len, panels)), squeeze=False)
    legend: dict[str, Patch] = {}  # by label: what occurs in the picture
    for row, (main, *others) in zip(rows, axes, strict=True):
        _show_image(main, render_main(row.images[:1], row.mean, row.std)[0])
        main.set_xlabel("{} × {} px".format(*row.images.shape[2:]), fontsize=SMALL)  # noqa: RUF001
        main.set_ylabel(f"{row.model_name}\n{row.name}", fontsize=SMALL)
        offered, free = augsub.supports(row.model), iter(others)
        for sub_model, draw_panels in zip(sub_models, panels, strict=True):
            if may_lack and any(member.name not in offered for member in sub_model.members):
                for panel in islice(free, len(draw_panels)):
                    panel.axis("off")
                    panel.text(
                        0.5, 0.5, "not offered\nby this model", ha="center", va="center", fontsize=8, color="0.4"
                    )
                continue
            with input_errors(f"{sub_model} for {row.model_name}"):
                recording = record(row.model, row.images, sub_model, seed + row.number)
            for draw_panel in draw_panels:
                legend |= draw_panel(next(free), row, recording)
    titles = [
        re.sub(r" (?=\+ |\w+=)", "\n", str(sub_model))
        for sub_model, of_it in zip(sub_models, panels, strict=True)
        for _ in of_it
    ]
    for panel, title in zip(axes[0], ["main model", *titles], strict=True):
        panel.set_title(title, fontsize=9)
    _lay_out(figure, axes, [legend[label] for label in LABELS if label in legend])
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with writing_errors(path), atomic.new_content(path) as file:
        picture.save(file, "PNG", optimize=True)


def _lay_out(figure: Figure, axes: np.ndarray, legend: Sequence[Patch]) -> None:
    """Square panels of equal size, (rows, columns), with room for what stands around them."""
    rows, columns = axes.shape
    width = LEFT + columns * (PANEL + GAP)
    legend_columns = max(1, int(width / LEGEND_ENTRY))
    legend_height = LEGEND_MARGIN + LEGEND_ROW * math.ceil(len(legend) / legend_columns)
    height = TITLE + rows * (PANEL + CAPTION) + legend_height
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - GAP / width,
        top=1 - TITLE / height,
        bottom=(legend_height + CAPTION) / height,
        wspace=GAP / PANEL,
        hspace=CAPTION / PANEL,
    )
    figure.legend(handles=legend, loc="lower center", ncols=legend_columns, frameon=False, fontsize=8)


def _panels_of(augmentation: augsub.SubModelAugmentation) -> list[DrawPanel]:
    """What shows the augmentation: the image, its paths, its activations, or several of them."""
    sites = {site for member in augmentation.members for site in member.sites}
    return [
        *([_draw_image] if sites - {"drop_path", "dropout"} else []),
        *([_draw_paths] if "drop_path" in sites else []),
        *([_draw_activations] if "dropout" in sites else []),
    ]


def _draw_image(axes: Axes, row: Row, recording: Recording) -> dict[str, Patch]:
    """The first draw; what became of its pixels, with the colour of one of them."""
    states, pictures = recording.states, render(recording, row.mean, row.std)
    _show_image(axes, pictures[0])
    axes.set_xlabel(_caption(recording), fontsize=SMALL)
    removed = (states[0] == PixelState.REMOVED).repeat_interleave(FINE, 0).repeat_interleave(FINE, 1)
    if removed.any():
        place = {"extent": axes.images[0].get_extent(), "origin": "upper"}
        area = axes.contourf(removed.cpu().numpy(), [0.5, 1.5], hatches=[HATCH], colors="none", **place)
        area.set_edgecolor(HATCH_COLOUR)
    top, left, height, width = recording.crops[0].tolist()
    if (height, width) != tuple(recording.images.shape[2:]):
        frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=VERMILION, linewidth=1.5)
        axes.add_patch(frame)
    seen = {}
    for state in set(states.unique().tolist()) - {PixelState.VISIBLE}:
        colour = (pictures.permute(0, 2, 3, 1)[states == state][0] / 255).tolist()
        pale = {"facecolor": "#F4F4F4", "hatch": HATCH} if state == PixelState.REMOVED else {"facecolor": colour}
        seen |= _entry(LABELS[state - 1], **pale)
    return seen


def _entry(label: str, **style: Any) -> dict[str, Patch]:
    """A part of the legend."""
    return {label: Patch(label=label, edgecolor=HATCH_COLOUR, **style)}


def _show_image(axes: Axes, picture: Tensor) -> None:
    axes.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.7")


def _caption(recording: Recording) -> str:
    """How much is left, in the numbers of the forward."""
    facts = []
    if recording.inputs.shape != recording.images.shape:
        facts.append("{} × {} px".format(*recording.inputs.shape[2:]))  # noqa: RUF001
    for hidden in recording.hidden:
        cells = hidden.cells[0]
        if hidden.state == PixelState.REMOVED:
            facts.append(f"{int((~cells).sum())} of {cells.numel()} tokens")
        else:
            facts.append(f"{cells.float().mean():.0%} {hidden.state.name.lower()}")
    return "\n".join(facts) or "all of it"


def _draw_paths(axes: Axes, row: Row, recording: Recording) -> dict[str, Patch]:
    """Pale where a module drops parts of an image, each for itself."""
    paths = recording.kept["drop_path"]
    shares = torch.stack([path.float().mean(dim=1) for path in paths], dim=1)
    axes.set_xticks(np.arange(0.5, shares.shape[1]), minor=True)
    axes.set_yticks(np.arange(0.5, shares.shape[0]), minor=True)
    axes.grid(which="minor", color="0.8", linewidth=0.5)
    axes.tick_params(which="minor", length=0, pad=0)
    return _show_kept(axes, shares, f"{len(paths)} residual branches", paths)


def _draw_activations(axes: Axes, row: Row, recording: Recording) -> dict[str, Patch]:
    """A part of the activations of each dropout."""
    dropouts = recording.kept["dropout"]
    noted = torch.stack([kept[:, : math.prod(ACTIVATIONS)] for kept in dropouts], dim=1)
    mosaic = noted.unflatten(-1, ACTIVATIONS).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return _show_kept(axes, mosaic, f"activations of {len(dropouts)} dropouts", dropouts)


def _show_kept(axes: Axes, kept: Tensor, label: str, calls: Sequence[Tensor]) -> dict[str, Patch]:
    """A column per module in the order of the forward, a row per sample."""
    colours = LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT])
    axes.imshow(kept.cpu().numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    share = torch.stack([call.float().mean() for call in calls]).mean()
    axes.set_xlabel(f"{label}\n{share:.0%} kept", fontsize=SMALL)
    axes.set_ylabel(f"{SAMPLES} samples", fontsize=SMALL, labelpad=1)
    axes.spines[:].set_color("0.7")
    return _entry("kept", facecolor=KEPT) | _entry("dropped", facecolor=DROPPED)
