"""Write docs/configuration.md from the schema in engine/config.py: every key, its type, its default, what it means.

python tools/pages/configuration_page.py
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from tabulate import tabulate

from engine import config
from engine.config_rules import RULES
from tools.pages.page import filled, run_page_tool

SCHEMA = Path(config.__file__)


def page() -> str:
    """The whole page, as Markdown."""
    comments = _comments()
    sections = [_section("The run itself", "", config.Config, comments)]
    for field in dataclasses.fields(config.Config):
        if dataclasses.is_dataclass(field.default_factory):
            sections.append(_section(f"`{field.name}`", f"{field.name}.", field.default_factory, comments))
            if field.name == "augsub":
                sections.append(_section("One of `augsub.sub_models`", "", config.SubModelConfig, comments))
    return filled(Path(__file__).with_suffix(".md"), sections="\n".join(sections))


def _section(title: str, prefix: str, schema: type, comments: dict[tuple[str, str], str]) -> str:
    rows = [
        [
            f"`{field.name}`",
            _type(field.type),
            f"`{default}`",
            _escaped(comments[schema.__name__, field.name]),
            _escaped(RULES.get(prefix + field.name, (None, ""))[1]),
        ]
        for field, default in _keys(schema)
    ]
    table = tabulate(rows, headers=["key", "type", "default", "meaning", "allowed"], tablefmt="pipe")
    return f"## {title}\n\n{schema.__doc__}\n\n{table}\n"


def _keys(schema: type) -> Iterator[tuple[dataclasses.Field, str]]:
    """Keys that are no sections, with their defaults as YAML."""
    for field in dataclasses.fields(schema):
        if not dataclasses.is_dataclass(field.default_factory):
            value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            yield field, yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _type(annotation: str) -> str:
    """Optional[Dict[str, Any]] as people say it."""
    if annotation.startswith("Optional["):
        return f"{_type(annotation.removeprefix('Optional[').removesuffix(']'))} or null"
    if annotation.startswith("Union["):
        return annotation.removeprefix("Union[").removesuffix("]").replace(", ", " or ")
    if annotation.startswith("Dict["):
        return "mapping"
    if annotation.startswith("List["):
        return f"list of {annotation.removeprefix('List[').removesuffix(']').replace('Any', 'mappings')}"
    return annotation


def _escaped(text: str) -> str:
    """Not to be taken for the border of a cell, or for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _comments() -> dict[tuple[str, str], str]:
    """The comment behind every key of the schema, by class and key."""
    text = SCHEMA.read_text()
    lines = text.splitlines()
    return {
        (schema.name, statement.target.id): lines[statement.lineno - 1].partition("  # ")[2]
        for schema in ast.parse(text).body
        if isinstance(schema, ast.ClassDef)
        for statement in schema.body
        if isinstance(statement, ast.AnnAssign)
    }


if __name__ == "__main__":
    sys.exit(run_page_tool(__doc__, "configuration.md", page))
