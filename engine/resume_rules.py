"""What may differ between a run and the command that resumes it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import yaml

from engine.config import MODELS_TRANSFORM, Config
from engine.config_file import leaves
from engine.errors import InputError
from engine.typed_yaml import read

# Where things are, how fast they go, what is reported: the run stays the same run, most of them to the bit.
MAY_CHANGE = (
    "output_dir",
    "plugins",
    "hooks",
    "model.pretrained",  # where the run started matters no more
    "model.checkpoint",
    "data.root",
    "data.workers",
    "data.bad_files",
    "data.allow_mismatch",
    "train.max_iters",
    "train.micro_batch",  # another number or size of GPUs
    "train.accumulation",
    "train.compile",
    "train.channels_last",
    "train.grad_checkpointing",
    "train.profile",
    "ema.*",
    "evaluation.period",
    "evaluation.batch",
    "evaluation.checkpoint",
    "checkpoint.*",
    "distributed.*",
    "log.*",
    "published.*",
    # remedies for a loss that is not finite
    "train.amp",
    "train.clip_norm",
    "optimizer.lr",
)
# What a configuration may leave to the model or the data; a resumed run takes what was found at its start.
FILLED_IN = ("data.image_size", "train.global_batch", *(f"transform.{key}" for key in MODELS_TRANSFORM))


def continue_from(config: Config, saved_yaml: Any) -> list[str]:
    """Compare `config` with the configuration of the checkpoint, and fill in what it leaves open.

    Returns:
        Changes that are allowed, as text, for the log.

    Raises:
        InputError: something else changed, or the checkpoint has no configuration.
    """
    changes = differences(config, _parsed(saved_yaml))
    refused = [key for key in changes if not _is_among(key, MAY_CHANGE)]
    if refused:
        listed = "; ".join(f"{key} = {changes[key][0]}, the run has {changes[key][1]}" for key in refused[:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise InputError(
            f"--resume: {listed}{more}. Only {', '.join(MAY_CHANGE)} may change; "
            "for anything else start another run from these weights: model.checkpoint = FILE"
        )
    return [f"{key}: {saved} -> {current}" for key, (current, saved) in changes.items() if key != "output_dir"]


def differences(config: Config, saved_content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, current and saved one; what `config` leaves open is filled in from the saved."""
    saved, current = leaves(saved_content), leaves(config)
    for key, value in saved.items():
        if current.get(key, value) is None and value is not None and _is_among(key, FILLED_IN):
            section, name = key.rsplit(".", 1)
            setattr(getattr(config, section), name, value)
            current[key] = value
    return {key: (current[key], saved[key]) for key in current if key in saved and current[key] != saved[key]}


def _parsed(saved_yaml: Any) -> dict[str, Any]:
    try:
        content = read(saved_yaml, Config) if isinstance(saved_yaml, str) else None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--resume: the checkpoint's configuration cannot be read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise InputError("--resume: the checkpoint holds no configuration, it is not one of a run")
    return content


def _is_among(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)
