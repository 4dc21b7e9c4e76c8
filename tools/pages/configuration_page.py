"""Write docs/configuration.md from the schema in engine/config.py: every key, its type, its default, what it means.

python tools/pages/configuration_page.py
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from tabulate import tabulate

from engine import config
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
    types = get_type_hints(schema)
    rows = [
        [
            f"`{field.name}`",
            _type(types[field.name]),
            f"`{default}`",
            _escaped(comments[schema.__name__, field.name]),
            _escaped(
                " ".join(rule.meaning for rule in config.notes(schema)[field.name] if isinstance(rule, config.Rule))
            ),
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


def _allowed(schema: type, key: str) -> str:
    return " ".join(note.meaning for note in config.notes(schema)[key] if isinstance(note, config.Rule))


def _type(hint: Any) -> str:
    """Optional[Dict[str, Any]] as people say it: mapping or null."""
    if get_origin(hint) is Union:
        return " or ".join("null" if part is type(None) else _type(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    return "mapping" if get_origin(hint) is dict else "mappings" if hint is Any else hint.__name__


def _escaped(text: str) -> str:
    """Not to be taken for the border of a cell, or for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _comments() -> dict[tuple[str, str], str]:
    """The comment behind every key of the schema, or above it, by class and key."""
    text = SCHEMA.read_text()
    lines = text.splitlines()
    return {
        (schema.name, statement.target.id): lines[statement.lineno - 1].partition("  # ")[2]
        or lines[statement.lineno - 2].partition("    # ")[2]
        for schema in ast.parse(text).body
        if isinstance(schema, ast.ClassDef)
        for statement in schema.body
        if isinstance(statement, ast.AnnAssign)
    }


if __name__ == "__main__":
    sys.exit(run_page_tool(__doc__, "configuration.md", page))
