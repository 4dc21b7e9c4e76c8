"""Print the tables of docs/configuration.md from the schema: every key, its type, its default, what it means."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from engine import config
from engine.text import markdown_table

HEADER = ("key", "type", "default", "meaning", "allowed")


def comments() -> dict[tuple[str, str], str]:
    """The comment behind every key of the schema, or above it, by class and key."""
    text = Path(config.__file__).read_text()
    lines = text.splitlines()
    return {
        (schema.name, key.target.id): lines[key.lineno - 1].partition("  # ")[2]
        or lines[key.lineno - 2].partition("    # ")[2]
        for schema in ast.parse(text).body
        if isinstance(schema, ast.ClassDef)
        for key in schema.body
        if isinstance(key, ast.AnnAssign)
    }


def in_words(hint: Any) -> str:
    """Optional[Dict[str, Any]]: "mapping or null"."""
    if get_origin(hint) is Union:
        return " or ".join("null" if part is type(None) else in_words(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {in_words(get_args(hint)[0])}"
    return "mapping" if get_origin(hint) is dict else "mappings" if hint is Any else hint.__name__


def section(title: str, schema: type[config.Section]) -> str:
    """The keys of a section that are no sections themselves."""
    rows = []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default_factory):
            continue
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        rules = [note.meaning for note in config.notes(schema)[field.name] if isinstance(note, config.Rule)]
        texts = [COMMENTS[schema.__name__, field.name], " ".join(rules)]
        cells = [text.replace("|", "\\|").replace("<", "&lt;") for text in texts]
        rows.append([f"`{field.name}`", in_words(get_type_hints(schema)[field.name]), f"`{default}`", *cells])
    return f"## {title}\n\n{schema.__doc__}\n\n{markdown_table(HEADER, rows)}\n"


if __name__ == "__main__":
    COMMENTS = comments()
    print(section("The run itself", config.Config))
    for key, schema in get_type_hints(config.Config).items():
        if dataclasses.is_dataclass(schema):
            print(section(f"`{key}`", schema))
            if key == "augsub":
                print(section("One of `augsub.sub_models`", config.SubModelConfig))
