"""Whether data are those that weights come from: the same classes by number and, where a run goes on, the same images.

What a checkpoint says of its data is `DataSource.facts`. `data.allow_mismatch` turns a refusal into a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.data.source import DataSource
from engine.errors import InputError

LOGGER = logging.getLogger("engine")
LISTED = 3  # classes in a line


def check_classes(config: Config, class_names: Sequence[str], known: Any, weights: str) -> None:
    """Compare the classes of the data with those that the outputs of a model stand for.

    Args:
        class_names: of the data, by number.
        known: those of the weights, by number; anything but strings in a list says nothing.
        weights: whose they are, for the message.

    Raises:
        InputError: others, or the same ones in another order.
    """
    if not isinstance(known, list | tuple) or not known or not all(isinstance(name, str) for name in known):
        return
    if tuple(known) == tuple(class_names):
        return
    difference = f"{weights} {_class_difference(class_names, known)}"
    if len(known) != len(class_names):  # the model's outputs do not fit, whatever is meant
        raise InputError(difference)
    _refuse(config, difference)


def _class_difference(class_names: Sequence[str], known: Sequence[str]) -> str:
    own, others = set(class_names), set(known)
    lacking, additional = (
        [name for name in known if name not in own],
        [name for name in class_names if name not in others],
    )
    if lacking or additional:
        sides = [f"{side} {_some(names)}" for side, names in (("lack", lacking), ("also have", additional)) if names]
        return f"is for other classes than the data have: the data {' and '.join(sides)}"
    pairs = enumerate(zip(known, class_names, strict=False))
    number, (theirs, ours) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    return f"numbers the classes of the data in another order: {number} is {theirs}, in the data {ours}"


def check_resumed(config: Config, source: DataSource, facts: dict[str, Any], checkpoint: Path) -> None:
    """Compare the data with those of the run that goes on: another image changes epochs, order and schedule.

    Args:
        facts: plain values of the checkpoint.

    Raises:
        InputError: other classes, or other training or held-out images.
    """
    check_classes(config, source.class_names, facts.get("class_names"), f"--resume: checkpoint {checkpoint}")
    saved = facts.get("fingerprints")
    if not isinstance(saved, dict):
        LOGGER.info("checkpoint %s does not tell its images: whether the data are the same is not checked", checkpoint)
        return
    for split, own in source.facts["fingerprints"].items():
        if (before := saved.get(split)) != own:
            images = before.get("images") if isinstance(before, dict) else None
            same = "as before, with other names or labels" if images == own["images"] else f"the run has {images}"
            _refuse(config, f"--resume: the {split} images are not those of {checkpoint}: {own['images']}, {same}")


def _refuse(config: Config, difference: str) -> None:
    if not config.data.allow_mismatch:
        raise InputError(f"{difference}; data.allow_mismatch=true goes on all the same")
    LOGGER.warning("WARNING: %s (data.allow_mismatch)", difference)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"
