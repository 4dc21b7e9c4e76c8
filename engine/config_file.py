"""Reading a configuration: YAML with `_base_`, then `key=value` overrides, then the schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config import FILLED_IN, Config, SubModelConfig, marked
from engine.config_check import check
from engine.config_rules import EXTENDS, FILE, MAY_CHANGE
from engine.errors import InputError
from engine.text import expanded, readable_name
from engine.typed_yaml import inside, read, read_value

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = tuple(field.name for field in fields(Config) if is_dataclass(field.default_factory))
# What YAML and OmegaConf raise: their own errors, and Python's where they convert or compare values unasked
REFUSALS = (
    yaml.YAMLError, OmegaConfBaseException, OSError,
    ValueError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key=value` overrides, complete and checked.

    Args:
        path: of the file, or its name in `configs/`: "swin_b".

    Raises:
        InputError: missing or malformed file, unknown key (the nearest one is named), value of the
            wrong type or out of range.
    """
    path = find_config(path)
    with reported(str(path)):
        content = _read(path, Config)
    config = _complete(content, str(path), overrides)
    config.output_dir = config.output_dir or f"runs/{path.stem}"
    return config


def read_over(schema: type, path: Path) -> DictConfig:
    """A YAML file with its `_base_`, merged over a dataclass that says which keys there are.

    Raises:
        InputError: missing or malformed file, unknown key (the nearest one is named), value of the wrong type.
    """
    with reported(str(path)):
        return _merge(OmegaConf.structured(schema), _read(path, schema), str(path))


def parse_config(text: str, place: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML text that inherits from no file, with overrides, complete and checked.

    Args:
        place: where the text stands, for messages.

    Raises:
        InputError: as `load_config`.
    """
    with reported(place):
        content = _mapping(text, Config, place)
    return _complete(content, place, overrides)


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


FREE = ("kwargs", "class_weights", "columns")  # whose keys are the user's


def leaves(config: Config) -> dict[str, Any]:
    """Values by their keys with dots; lists, and mappings of free keys, are values as a whole."""
    return dict(_leaves(asdict(config)))


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and key not in FREE:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key == "sub_models":
            yield prefix + key, [_as_written(sub_model) for sub_model in value]
        else:
            yield prefix + key, value


def _as_written(sub_model: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that few set, as pages show a sub-model, and results have it of runs from before those keys."""
    rare = {"share": SubModelConfig.share, "learn_from": SubModelConfig.learn_from}
    return {key: value for key, value in sub_model.items() if rare.get(key, ...) != value}


def changes_on_resume(config: Config, saved: Config) -> list[str]:
    """What `config` changes in the run whose configuration is `saved`, as text.

    Raises:
        InputError: something that makes it another run.
    """
    changes = differences(config, saved)
    may_change = [*marked(MAY_CHANGE), *(marked(EXTENDS) if config.train.extend else ())]
    refused = [key for key in changes if not any(fnmatch(key, pattern) for pattern in may_change)]
    if refused:
        listed = "; ".join(f"{key} = {changes[key][0]}, the run has {changes[key][1]}" for key in refused[:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        is_longer = all(any(fnmatch(key, pattern) for pattern in marked(EXTENDS)) for key in refused)
        remedy = (
            "train.extend=true goes on so, with all of the run's state"
            if is_longer
            else "this would be another run: start it from these weights, model.checkpoint=FILE"
        )
        raise InputError(f"--resume: {listed}{more}: {remedy}")
    return [f"{key}: {saved} -> {current}" for key, (current, saved) in changes.items() if key != "output_dir"]


def differences(config: Config, saved: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, current and saved one."""
    before = leaves(saved)
    return {key: (value, before[key]) for key, value in leaves(config).items() if value != before[key]}


def fill_in_from(config: Config, saved: Config) -> None:
    """Set what `config` leaves open to what the run found at its start, in the model or in the data."""
    for key in FILLED_IN:
        section, name = key.split(".")
        part = getattr(config, section)
        if getattr(part, name) is None:
            setattr(part, name, getattr(getattr(saved, section), name))


def find_config(name: str | Path) -> Path:
    """The file that a path, or the name of a file in `configs/`, with or without its suffix, means.

    Raises:
        InputError: there is none; the nearest name is said.
    """
    path = Path(expanded(str(name)))
    with reported(str(name)):
        folders = [path.parent, *([CONFIGS] if path.name == str(name) else [])]
        candidates = [folder / file for folder in folders for file in (path.name, f"{path.name}.yaml")]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise InputError(f"config file {name} does not exist{_nearest_file(path, folders)}")


def _complete(content: DictConfig, place: str, overrides: Sequence[str]) -> Config:
    """What `content` and the overrides say, and the defaults of everything else."""
    with reported(place):
        merged = _merge(OmegaConf.structured(Config), content, place)
    for override in overrides:
        with reported(f"override {override!r}"):
            _apply(override, merged)
    with reported(place):
        for key in marked(FILE):
            if path := OmegaConf.select(merged, key):
                OmegaConf.update(merged, key, expanded(path))
        config: Config = OmegaConf.to_object(merged)
    check(config)
    return config


def _read(path: Path, schema: type, seen: tuple[Path, ...] = ()) -> DictConfig:
    """The file merged over the files it names in `_base_` (paths relative to itself)."""
    if not path.is_file():
        raise InputError(f"config file {path} does not exist{_nearest_file(path, [path.parent])}")
    if path.resolve() in seen:
        raise InputError(f"{path}: _base_ leads back to this file")
    with reported(f"{path}: not a readable YAML file"):
        content = _mapping(path.read_bytes(), schema, str(path))
    for base in reversed(_bases(content, path)):
        content = _merge(_read(path.parent / expanded(base), schema, (*seen, path.resolve())), content, str(path))
    return content


def _mapping(text: str | bytes, schema: type, place: str) -> DictConfig:
    """The content of a YAML text."""
    content = read(text, schema) if isinstance(text, str | bytes) else ()
    if not isinstance(content, dict | None):
        raise InputError(f"{place}: the top level must be keys with values")
    return OmegaConf.create(content or {})


def _bases(content: DictConfig, path: Path) -> list[str]:
    """Take the names of the files to inherit from out of `content`."""
    with reported(f"{path}: _base_"):
        bases = content.pop("_base_", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list | ListConfig) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: _base_ = {bases!r}: must be the name of a file, or a list of such names")
    return list(names)


def _merge(config: DictConfig, content: DictConfig, place: str) -> DictConfig:
    """`content` over `config`; where they do not go together, the error names the section too."""
    sections = OmegaConf.to_container(content)
    for key in SECTIONS:
        section = sections.get(key, {})
        if not isinstance(section, dict) and not (isinstance(section, str) and section.startswith("${")):
            raise InputError(f"{place}: {key} = {section!r}: must be keys with values")
    try:
        return OmegaConf.merge(config, content)
    except REFUSALS as error:
        known = str(getattr(error, "full_key", ""))  # inside a list it may begin at the element: "augmentations"
        for key in () if known.startswith(SECTIONS) else content:
            with reported(f"{place}: {key}"):
                OmegaConf.merge(config, OmegaConf.masked_copy(content, key))
        raise


def _apply(override: str, config: DictConfig) -> None:
    """Set one key; a mapping of free keys (`kwargs`) replaces the one that was there."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: must have the form key=value, for example train.epochs=10")
    if readable_name(override) != override:
        raise InputError(f"override {override!r}: must be UTF-8, as the configuration that a run saves is")
    if others := _elsewhere(key):
        raise InputError(f"override {override!r}: no such key, did you mean {' or '.join(others)}?")
    old = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    is_free = isinstance(old, DictConfig) and OmegaConf.get_type(old) is dict
    value = read_value(text, reduce(inside, key.split("."), Config))
    OmegaConf.update(config, key, value, merge=not is_free)


def _elsewhere(key: str) -> list[str]:
    """Keys of this name in other sections, if there is none here: optimizer.lr for train.lr."""
    key = key.partition("[")[0]  # of a list its whole
    if any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in leaves(Config())):
        return []
    return keys_named(key.split(".")[-1])


def keys_named(name: str) -> list[str]:
    """Keys of any section that end in this name."""
    return [key for key in leaves(Config()) if key.split(".")[-1] == name]


@contextmanager
def reported(place: str) -> Iterator[None]:
    """Errors of YAML and OmegaConf become an InputError at `place`."""
    try:
        yield
    except REFUSALS as error:
        raise InputError(f"{place}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The first line of OmegaConf's message, with the full key where it knows one; YAML's problem, with its line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"byte {error.position}: {error.reason}"
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key else message


def _nearest_file(path: Path, folders: Sequence[Path]) -> str:
    known = {
        file.stem: file.stem if folder == CONFIGS and len(folders) > 1 else str(file)
        for folder in reversed(folders)
        for file in folder.glob("*.yaml")
    }
    nearest = [known[name] for name in difflib.get_close_matches(path.name.removesuffix(".yaml"), known)]
    return f", did you mean {' or '.join(nearest)}?" if nearest else ""
