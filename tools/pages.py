"""Pages of the documentation that a tool writes: a template beside the tool, and what it fills in."""

from __future__ import annotations

from pathlib import Path
from string import Template

from engine import atomic
from engine.errors import writing_errors

DOCS = Path(__file__).parent.parent / "docs"


def filled(template: str, **parts: object) -> str:
    """The text of a template in this folder, with every `$name` replaced."""
    return Template(Path(__file__).with_name(template).read_text()).substitute(parts)


def write(page: Path, text: str) -> None:
    """Replace a page, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    with writing_errors(page):
        atomic.write_text(page, text)
