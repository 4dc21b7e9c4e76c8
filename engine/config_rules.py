"""Which values a key of the configuration may have, and what else is true of it, as parts of its type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, List, TypeVar  # noqa: UP035  (OmegaConf reads these at run time)

# ruff: noqa: UP006


@dataclass(frozen=True)
class Rule:
    """Which values a key may have; null is left alone."""

    allows: Callable[[Any], bool]
    meaning: str


@dataclass(frozen=True)
class Mark:
    """A property of a key."""

    meaning: str


# Where things are, how fast they go, what is reported, remedies for a loss that is not finite: the run stays the run
MAY_CHANGE = Mark("may differ between a run and the command that resumes it")
# How long and along which curve: the run stays the run if somebody says that it is to be another one from now on
EXTENDS = Mark("may differ where train.extend is true")
FILE = Mark("the name of a file or a folder: `~` is a home folder")


def at_least(bound: float) -> Rule:
    """A finite number that is not below `bound`."""
    return Rule(lambda value: bound <= value < math.inf, f"at least {bound}")


def above(bound: float) -> Rule:
    """A finite number greater than `bound`."""
    return Rule(lambda value: bound < value < math.inf, f"greater than {bound}")


def one_of(*words: str | bool) -> Rule:
    """One of a few words."""
    return Rule(lambda value: value in words, "one of " + ", ".join(str(word).lower() for word in words))


def increasing(low: float, high: float, meaning: str) -> Rule:
    """Two increasing numbers above `low`, at most `high`."""
    return Rule(
        lambda value: len(value) == 2 and low < value[0] <= value[1] <= high, f"two increasing numbers {meaning}"
    )


def channels(low: float, meaning: str) -> Rule:
    """One number for each channel, all above `low`."""
    return Rule(
        lambda value: len(value) > 0 and all(low < number < math.inf for number in value),
        f"a list of {meaning}, one for each channel",
    )


T = TypeVar("T")
Tunable = Annotated[T, MAY_CHANGE]
Extendable = Annotated[T, EXTENDS]
File = Annotated[str, FILE]
Count = Annotated[int, at_least(1)]
NotNegativeInt = Annotated[int, at_least(0)]
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, above(0)]
Share = Annotated[float, Rule(lambda value: 0 <= value < 1, "in [0, 1)")]
Part = Annotated[float, Rule(lambda value: 0 < value <= 1, "in (0, 1]")]
Probability = Annotated[float, Rule(lambda value: 0 <= value <= 1, "in [0, 1]")]
Interval = Annotated[List[float], increasing(0, 1e38, "above 0")]  # what fits into float32
SIZE = Rule(
    lambda value: (
        all(type(side) is int and side > 0 for side in (value if isinstance(value, list) else [value] * 2))
        and (not isinstance(value, list) or len(value) == 2)
    ),
    "a number of pixels, or two of them, [height, width]",
)
SEED = Rule(lambda value: 0 <= value < 2**32, "in [0, 2**32)")
BETAS = Rule(lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)")
MINMAX = Rule(
    lambda value: len(value) == 2 and 0 < value[0] < value[1] <= 1, "two increasing numbers above 0, at most 1"
)
WANDB = Rule(
    lambda value: 0 < len(value) <= 128 and not set(value) & set("/\\#?%:"), "1 to 128 characters, none of / \\ # ? % :"
)
