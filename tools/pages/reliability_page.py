"""Write docs/reliability.md from the results of the fault tests.

pytest -m faults --junitxml=faults.xml
python tools/pages/reliability_page.py faults.xml
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import timm
import torch

from engine.command_line import as_path, exit_code, tool_parser
from engine.config import MAY_CHANGE, marked
from engine.errors import InputError
from engine.table import markdown_table
from tools.pages.page import DOCS, filled, write_page

PAGE = DOCS / "reliability.md"


@dataclass
class Row:
    """A fault, and how the tests of it ended.

    Attributes:
        survived: runs that met the fault and came out as promised.
        problems: failures and skips.
    """

    promise: str
    tests: list[str] = field(default_factory=list)
    survived: int = 0
    problems: list[str] = field(default_factory=list)


def read_rows(reports: Iterable[Path]) -> dict[str, Row]:
    """Rows by fault, in the order of the tests.

    Raises:
        InputError: a report is none, or has no fault tests in it.
    """
    rows: dict[str, Row] = {}
    for report in reports:
        try:
            cases = list(ElementTree.parse(report).iter("testcase"))
        except (OSError, ElementTree.ParseError) as error:
            raise InputError(f"{report}: cannot be read as a JUnit report: {error}") from error
        for case in cases:
            properties = {item.get("name"): item.get("value") for item in case.iter("property")}
            if "fault" not in properties:
                continue
            row = rows.setdefault(properties["fault"], Row(properties["promise"]))
            test = f"{case.get('classname').rsplit('.', 1)[-1]}.py::{case.get('name').partition('[')[0]}"
            if test not in row.tests:
                row.tests.append(test)
            ended_badly = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
            row.problems += ended_badly
            row.survived += 0 if ended_badly else int(properties.get("survived", 1))
    if not rows:
        raise InputError(f"{', '.join(map(str, reports))}: holds no results of fault tests")
    return rows


def page(rows: dict[str, Row]) -> str:
    """The whole page."""
    table = [
        [
            fault,
            row.promise,
            ", ".join(f"`{test}`" for test in row.tests),
            "; ".join([str(row.survived), *row.problems]),
        ]
        for fault, row in rows.items()
    ]
    header = ["fault", "what is promised", "how it is tested", "runs survived"]
    versions = f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {versions}"
    return filled(
        Path(__file__).with_suffix(".md"),
        may_change="\n".join(textwrap.wrap(", ".join(marked(MAY_CHANGE)), width=110)),
        table=markdown_table(header, table),
        machine=machine,
        total=f"{sum(row.survived for row in rows.values())} runs survived {len(rows)} kinds of faults",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    rows = read_rows(arguments.reports)
    write_page(arguments.output, page(rows))
    print(f"{arguments.output}: {len(rows)} rows")


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    parser = tool_parser(__doc__)
    parser.add_argument("reports", nargs="+", type=as_path, help="what pytest --junitxml wrote")
    parser.add_argument("--output", type=as_path, default=PAGE, help="default: docs/reliability.md")
    return exit_code(partial(run, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
