"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.evaluation.measurement import Outcome

WEIGHTS = {"": "trained", "ema_": "averaged"}  # by the prefix of their results


@dataclass(frozen=True)
class Setting:
    """What was evaluated, and how.

    Attributes:
        model: timm's name.
        source: checkpoint, or whose weights they are.
        data: the images in a few words.
        image_size: pixels, square.
        crop: share of the resized image's side that the centre crop keeps; None: images are used as they are.
        interpolation: of the resizing, or None.
        parameters: of the main model.
        class_names: by label.
    """

    model: str
    source: str
    data: str
    image_size: int
    crop: float | None
    interpolation: str | None
    parameters: int
    class_names: Sequence[str]


@dataclass(frozen=True)
class SubModelFigures:
    """Accuracy of one sub-model; `ratio` is None for one of several augmentations."""

    name: str
    ratio: float | None
    figures: dict[str, float]


@dataclass
class Evaluated:
    """Results of one set of weights; `prefix` is "" or, for averaged ones, "ema_"."""

    prefix: str
    outcome: Outcome
    sub_models: list[SubModelFigures] = field(default_factory=list)


def mean_corruption_error(outcome: Outcome) -> float:
    """Top-1 error in percent, mean over all corruptions and severities; not divided by AlexNet's as the mCE is."""
    return sum(100 - figures["top1"] for figures in outcome.parts.values()) / len(outcome.parts)
