"""Write docs/performance.md from files of the benchmark, a section for each machine.

python tools/pages/performance_page.py docs/performance/*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.command_line import as_path, exit_code, tool_parser
from engine.errors import InputError
from tools.benchmarking.figures import PARTS, Figure, table
from tools.pages.page import DOCS, filled, write_page

PAGE = DOCS / "performance.md"
NO_GPU = "Figures of a GPU are missing so far: none of these machines has one."


def read(file: Path) -> dict[str, Any]:
    """A file of the benchmark, its figures as such.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_text())
        figures = [Figure(**figure) for figure in content["figures"]]
        return {"machine": dict(content["machine"]), "command": str(content["command"]), "figures": figures}
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: is not a file of tools/benchmark.py: {type(error).__name__}: {error}") from error


def page(contents: list[dict[str, Any]]) -> str:
    """The whole page."""
    sections = [
        section(machine, list(of_machine))
        for machine, of_machine in groupby(sorted(contents, key=_machine_of), key=_machine_of)
    ]
    if not any("NVIDIA" in machine or "AMD Instinct" in machine for machine in map(_machine_of, contents)):
        sections.insert(0, NO_GPU)
    return filled(Path(__file__).with_suffix(".md"), machines="\n\n".join(sections))


def section(machine: str, contents: list[dict[str, Any]]) -> str:
    """All that was measured on a machine."""
    parts = [f"## {machine}"]
    for name, title in PARTS.items():
        found = [(content["command"], _of_part(content, name)) for content in contents]
        found = [(command, figures) for command, figures in found if figures]
        if found:
            parts.append(f"### {title}")
        for command, figures in found:
            parts.append(f"`{command}`")
            parts += [table(list(figures), "github") for _, figures in groupby(figures, key=lambda figure: figure.case)]
    return "\n\n".join(parts)


def _of_part(content: dict[str, Any], name: str) -> list[Figure]:
    return [figure for figure in content["figures"] if figure.part == name]


def _machine_of(content: dict[str, Any]) -> str:
    facts = content["machine"]
    versions = ", ".join(f"{key} {facts[key]}" for key in ("torch", "timm", "python") if key in facts)
    return f"{facts.get('device', 'unknown')}, {facts.get('cores', '?')} CPU cores, {versions}"


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    write_page(arguments.output, page([read(file) for file in arguments.files]))
    print(arguments.output)


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    parser = tool_parser(__doc__)
    parser.add_argument("files", nargs="+", type=as_path, metavar="FILE", help="what tools/benchmark.py wrote")
    parser.add_argument("--output", type=as_path, default=PAGE, help="default: docs/performance.md")
    return exit_code(partial(run, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
