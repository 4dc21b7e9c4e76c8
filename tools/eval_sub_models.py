"""The sub-models that an evaluation looks at: the configuration's, or one by name, at one or several ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import augsub
from engine.config import Config
from engine.errors import InputError, input_errors

DEFAULT_RATIO = 0.5


class NamedSubModel(NamedTuple):
    """A sub-model's augmentation, its name without the ratio, and the ratio; None for several augmentations."""

    name: str
    ratio: float | None
    augmentation: augsub.SubModelAugmentation


def parse_ratios(text: str | None) -> list[float]:
    """Numbers separated by commas.

    Raises:
        InputError: something else, or a number outside [0, 1).
    """
    try:
        ratios = [] if text is None else [float(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"--ratios {text}: allowed are numbers in [0, 1) with commas between them") from error
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise InputError(f"--ratios {text}: {ratio:g} is not in [0, 1)")
    return ratios


def sub_models(config: Config, name: str | None, ratios: Sequence[float]) -> list[NamedSubModel]:
    """Each sub-model of the configuration, or the one that `name` names; at each of `ratios` if there are any.

    Raises:
        InputError: no sub-model, an unknown one, or ratios for one of several augmentations.
    """
    specs = [sub.augmentations for sub in config.augsub.sub_models]
    if name is not None:
        specs = [[{"name": name, "ratio": DEFAULT_RATIO}]]
    if not specs:
        raise InputError(
            "--sub-model: the configuration has none, augsub.sub_models = []; choose one with --augsub NAME"
        )
    place = "augsub.sub_models" if name is None else f"--augsub {name}"
    with input_errors(place):
        return [_named(spec) for configured in specs for spec in _at_ratios(configured, ratios)]


def _at_ratios(spec: Sequence[Any], ratios: Sequence[float]) -> Iterator[Sequence[Any]]:
    if not ratios:
        yield spec
        return
    members = [{"name": member} if isinstance(member, str) else member for member in spec]
    if len(members) != 1 or not isinstance(members[0], Mapping):
        raise InputError(f"--ratios: {spec} is not one augmentation; choose one with --augsub NAME")
    for ratio in ratios:
        yield [{**members[0], "ratio": ratio}]


def _named(spec: Sequence[Any]) -> NamedSubModel:
    augmentation = augsub.build(spec)
    if len(augmentation.members) == 1:
        (member,) = augmentation.members
        return NamedSubModel(member.name, member.ratio, augmentation)
    return NamedSubModel(str(augmentation), None, augmentation)
