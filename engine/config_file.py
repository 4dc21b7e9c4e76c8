"""Reading a configuration: YAML with `_base_`, then `key=value` overrides, then the schema."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config import Config
from engine.config_rules import check
from engine.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key=value` overrides, complete and checked.

    Raises:
        InputError: missing or malformed file, unknown key (the nearest one is named), value of the
            wrong type or out of range.
    """
    path = Path(path)
    merged = _merge(OmegaConf.structured(Config), _read(path, seen=()), place=str(path))
    for override in overrides:
        merged = _merge(merged, _parse(override), place=f"override {override!r}")
    try:
        config: Config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {_one_line(error)}") from error
    config.output_dir = config.output_dir or f"runs/{path.stem}"
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """The file merged over the files it names in `_base_` (paths relative to itself)."""
    if not path.is_file():
        raise InputError(f"config file {path} does not exist{_nearest_file(path)}")
    if path.resolve() in seen:
        raise InputError(f"{path}: _base_ leads back to this file")
    try:
        content = OmegaConf.create(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"{path}: the top level must be keys with values")
    bases = content.pop("_base_", [])
    for base in reversed([bases] if isinstance(bases, str) else bases):
        content = OmegaConf.merge(_read(path.parent / base, (*seen, path.resolve())), content)
    return content


def _parse(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: must have the form key=value, for example train.epochs=10")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"override {override!r}: {_one_line(error)}") from error


def _merge(config: DictConfig, update: DictConfig, place: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        raise InputError(f"{place}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The first line of OmegaConf's message, with the full key where it knows one."""
    message = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key else message


def _nearest_file(path: Path) -> str:
    known = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    match = difflib.get_close_matches(path.name, known, n=1)
    return f", did you mean {path.parent / match[0]}?" if match else ""
