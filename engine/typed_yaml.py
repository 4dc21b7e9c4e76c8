"""YAML read for a schema: a key that holds text gets the text as it was typed, all others what YAML 1.2 says.

YAML 1.1, which PyYAML and OmegaConf read, makes 20240101 of 2024_01_01, 1.1 of 1.10, 7 of 007, 1230 of 20:30 and
false of off, whatever the key is for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from typing import Any, List, Union, get_args, get_origin, get_type_hints  # noqa: UP035  (as the schema is written)

import yaml

# ruff: noqa: UP006, UP007


class Merge:
    """The key `<<`, whose value's keys belong to the mapping around it."""


# What a plain scalar means: YAML 1.2's core schema, and `<<`. Without its octal 0o17, which PyYAML's dumper leaves bare
SCALARS = {
    "null": (type(None), r"~|null|Null|NULL|"),
    "bool": (bool, r"true|True|TRUE|false|False|FALSE"),
    "int": (int, r"[-+]?[0-9]+|0x[0-9a-fA-F]+"),
    "float": (
        float,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
    "merge": (Merge, r"<<"),
}
TAG = "tag:yaml.org,2002:"


def read(text: str | bytes, schema: Any) -> Any:
    """The content of a YAML document whose top level has the type `schema`; None if it is empty.

    Raises:
        yaml.YAMLError: no YAML, a key that comes twice, or a tag.
    """
    return yaml.load(text, partial(_Loader, schema=schema))


def read_value(text: str, schema: Any) -> Any:
    """What stands behind `key=`: a list, a mapping or a string in quotes as YAML, anything else as it was typed.

    Args:
        schema: the type of the value.

    Raises:
        yaml.YAMLError: brackets or quotes that do not close.
    """
    text = text.strip()
    if text.startswith(("'", '"') if str in _alternatives(schema) else ("'", '"', "[", "{")):
        return read(text, schema)
    loader = _Loader("", schema)
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def inside(schema: Any, key: str | None) -> Any:
    """The type of the value at `key` of a mapping, or an index of a list, of type `schema`; None: of the keys."""
    for kind in _alternatives(schema):
        if is_dataclass(kind):  # keys that it has not are refused, but for _base_
            return Union[str, Merge] if key is None else _fields(kind).get(key, Union[str, List[str]])
        if get_origin(kind) is list:
            return get_args(kind)[0]
        if get_origin(kind) is dict:
            return Union[str, Merge] if key is None else get_args(kind)[1]
    return Any


_fields = cache(get_type_hints)


def _alternatives(schema: Any) -> tuple[Any, ...]:
    return get_args(schema) if get_origin(schema) is Union else (schema,)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Knows the type of the node that is being composed."""

    yaml_implicit_resolvers: Mapping[str, Any] = {}  # none of YAML 1.1's

    def __init__(self, stream: str | bytes, schema: Any) -> None:
        super().__init__(stream)
        self._types = [schema]  # of the nodes around, the innermost one last

    def descend_resolver(self, parent: yaml.Node | None, index: yaml.Node | int | None) -> None:
        """Called before a node is composed; `index` is its key, or None for a key itself."""
        if isinstance(index, yaml.ScalarNode) and any(key.value == index.value for key, _ in parent.value):
            raise yaml.MarkedYAMLError(problem=f"found duplicate key {index.value}", problem_mark=index.start_mark)
        key = index.value if isinstance(index, yaml.Node) else index
        self._types.append(self._types[-1] if parent is None else inside(self._types[-1], key))

    def ascend_resolver(self) -> None:
        """Called after a node was composed."""
        self._types.pop()

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        """The tag of a node: that of text, where it may be text and not what it looks like; nothing is no text."""
        tag = super().resolve(kind, value, implicit)
        allowed = _alternatives(self._types[-1])
        looks_like, _ = SCALARS.get(tag.removeprefix(TAG), (str, ""))
        is_text = kind is yaml.ScalarNode and value and str in allowed and looks_like not in allowed
        return f"{TAG}str" if is_text else tag


class Dumper(yaml.SafeDumper):
    """Writes what `read` reads back: text that either version of YAML takes for something else is in quotes."""


for _name, (_, _pattern) in SCALARS.items():
    for _of in (_Loader, Dumper):
        _of.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor(f"{TAG}int", lambda _, node: int(node.value, 16 if node.value.startswith("0x") else 10))
