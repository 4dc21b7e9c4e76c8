"""A report as one HTML file that needs nothing else: Markdown whose tables sort, pictures that can be read off."""

from __future__ import annotations

import html
import io
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote, unquote

import markdown
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from engine import atomic
from engine.errors import writing_errors
from engine.text import to_json

PAGE = Path(__file__).with_suffix(".html")
EXTENSIONS = ("tables", "fenced_code", "sane_lists")
PICTURE = re.compile(r'<p><img alt="(.*?)" src="(.*?)" ?/?></p>')
PADDING = 0.06  # inches around a pair of axes
CSS_PIXELS = 96  # per inch
SMALLEST = 0.6  # of a drawing's size, which a phone scrolls rather than shrinks further
MOST_POINTS = 500  # of a curve whose values are told
SPECIAL = re.compile(r"([\\`*_{}\[\]|#])")  # characters that Markdown reads
Picture = Figure | Tensor


def plain(text: object) -> str:
    """Text that Markdown and HTML leave as it is: the name of a class, a run or a file."""
    return SPECIAL.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def picture_line(name: str) -> str:
    """The paragraph of a picture whose name, whatever it is made of, is its caption."""
    return f"![{plain(name)}]({quote(name, safe='')})"


def write_report(path: Path, text: str, pictures: Mapping[str, Picture]) -> None:
    """Write a page.

    Args:
        text: Markdown that begins with its title; `![caption](name)` in a paragraph of its own is a picture, its name
            quoted as in a URL.
        pictures: by name a figure, each of whose pairs of axes goes where there is room, or images (B, 3, H, W) uint8.

    Raises:
        RunError: the file cannot be written.
    """
    content = markdown.markdown(text, extensions=EXTENSIONS)
    content = PICTURE.sub(partial(_with_picture, pictures), content)
    content = content.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    title = text.partition("\n")[0].removeprefix("# ").replace("\\", "")
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, Template(PAGE.read_text()).substitute(title=title, content=content))


def _with_picture(pictures: Mapping[str, Picture], found: re.Match) -> str:
    """A picture and its caption, which is HTML already."""
    caption, picture = found[1], pictures[unquote(found[2])]
    inside = _axes(picture) if isinstance(picture, Figure) else _images(picture)
    return f"<figure>{inside}<figcaption>{caption}</figcaption></figure>"


def _images(images: Tensor) -> str:
    """Images (B, 3, H, W) uint8 beside each other."""
    parts = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
        parts.append(f'<img class="photograph" alt="" src="{_data_url("image/png", content)}">')
    return "".join(parts)


def _axes(figure: Figure) -> str:
    """Each pair of axes and each legend as a drawing of its own, with the values of the curves in it."""
    drawn = [axes for axes in figure.axes if axes.axison]
    for axes in drawn:
        axes.tick_params(labelbottom=True, labelleft=True)  # of axes that are shared too
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is hidden below keeps its place
    parts: list[Axes | Legend] = [*drawn, *figure.legends]
    for part in parts:
        part.set_visible(False)
    if figure.get_suptitle():
        figure.suptitle("")  # the caption says it
    content = []
    for part in parts:
        part.set_visible(True)
        box = part.get_tightbbox().padded(PADDING * figure.dpi)
        inches, svg = box.transformed(figure.dpi_scale_trans.inverted()), io.BytesIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "augsub"}):  # text as text, same bytes
            figure.savefig(svg, format="svg", bbox_inches=inches, transparent=True, metadata={"Date": None})
        values = to_json(_curves(part, box)) if isinstance(part, Axes) else "[]"
        width = CSS_PIXELS * inches.width
        style = f"width:{width:.0f}px;min-width:{SMALLEST * width:.0f}px"
        content.append(
            f'<div class="drawing" style="{style}" data-curves="{html.escape(values)}">'
            f'<img alt="" src="{_data_url("image/svg+xml", svg)}"></div>'
        )
        part.set_visible(False)
    return "".join(content)


def _curves(axes: Axes, box: Bbox) -> list[dict[str, Any]]:
    """Of each line of data its name and its points: where in the drawing, in parts of it, and their values."""
    curves, left_top = [], np.array([box.x0, box.y1])
    names = {container.lines[0]: container.get_label() for container in axes.containers if hasattr(container, "lines")}
    for line in axes.lines:
        points = np.asarray(line.get_xydata(), dtype=float)[:: 1 + len(line.get_xdata()) // MOST_POINTS]
        if line.get_transform() != axes.transData or not len(points):
            continue  # a mark across the axes, or an entry of the legend alone
        places = (axes.transData.transform(points) - left_top) / (box.width, -box.height)
        name = str(names.get(line, line.get_label()))
        curves.append(
            {
                "name": axes.get_ylabel() if name.startswith("_") else name,
                "points": [
                    [round(left, 4), round(top, 4), f"{x:.4g}", f"{y:.4g}"]
                    for (left, top), (x, y) in zip(places.tolist(), points.tolist(), strict=True)
                ],
            }
        )
    return curves


def _data_url(kind: str, content: io.BytesIO) -> str:
    return f"data:{kind};base64,{b64encode(content.getvalue()).decode()}"
