"""Reading a configuration: YAML with `_base_`, then `key=value` overrides, then the schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    with _reported(str(path)):
        merged = OmegaConf.merge(OmegaConf.structured(Config), _read(path, seen=()))
    for override in overrides:
        with _reported(f"override {override!r}"):
            merged = _apply(override, merged)
    with _reported(str(path)):
        config: Config = OmegaConf.to_object(merged)
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
    with _reported(f"{path}: not a readable YAML file"):
        content = OmegaConf.load(path)
    if not isinstance(content, DictConfig):
        raise InputError(f"{path}: the top level must be keys with values")
    bases = content.pop("_base_", [])
    for base in reversed([bases] if isinstance(bases, str) else bases):
        content = OmegaConf.merge(_read(path.parent / base, (*seen, path.resolve())), content)
    return content


def _apply(override: str, config: DictConfig) -> DictConfig:
    """The configuration with one key set; a mapping of free keys (`kwargs`) replaces the one that was there."""
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: must have the form key=value, for example train.epochs=10")
    update = OmegaConf.from_dotlist([override])
    merged = OmegaConf.merge(config, update)
    old, new = OmegaConf.select(config, key), OmegaConf.select(update, key)
    if isinstance(old, DictConfig) and OmegaConf.get_type(old) is dict and isinstance(new, DictConfig):
        OmegaConf.update(merged, key, new, merge=False)
    return merged


@contextmanager
def _reported(place: str) -> Iterator[None]:
    """Errors of YAML and OmegaConf become an InputError at `place`."""
    try:
        yield
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
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
