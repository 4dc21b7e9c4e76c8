"""Pages of the documentation that are written by a program: a template beside it, and what it fills in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import Template

from engine import atomic
from engine.command_line import as_path, exit_code, tool_parser
from engine.errors import writing_errors

DOCS = Path(__file__).parents[2] / "docs"


def filled(template: Path, **parts: object) -> str:
    """The text of a template with every `$name` replaced."""
    return Template(template.read_text()).substitute(parts)


def write_page(page: Path, text: str) -> None:
    """Replace a page, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    with writing_errors(page):
        atomic.write_text(page, text)


def run_page_tool(description: str | None, name: str, text: Callable[[], str]) -> int:
    """A command that writes the page of that name in docs/, or the file of its `--output`.

    Returns: exit code 0, or 2 with one line for an error.
    """
    parser = tool_parser(description)
    parser.add_argument("--output", type=as_path, default=DOCS / name, help=f"default: docs/{name}")
    output = parser.parse_args().output
    return exit_code(lambda: write_page(output, text()))
