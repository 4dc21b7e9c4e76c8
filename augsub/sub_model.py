"""A sub-model of the objective: its augmentation, and how much it counts at which time of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from augsub.augmentation import SubModelAugmentation
from augsub.registry import AugmentationSpec, build

START, END = 0.0, float("inf")  # epochs


@dataclass(frozen=True)
class Ramp:
    """A number that goes in a line from one value to another over the first epochs, and stays there.

    It is a function of the epoch alone, so that a resumed run finds it again. In a configuration
    ``{from: 0.1, to: 0.5, epochs: 20}``.

    Args:
        start: value at the beginning.
        end: value from `epochs` on.
        epochs: more than 0.

    Raises:
        ValueError: for an argument that is no number, or `epochs` that are not positive.
    """

    start: float
    end: float
    epochs: float

    def __post_init__(self) -> None:
        if not all(_is_number(value) for value in (self.start, self.end, self.epochs)) or self.epochs <= 0:
            raise ValueError(f"{self}: allowed are numbers, and epochs above 0")

    def at(self, epoch: float | None) -> float:
        """The value at an epoch, which may be a fraction; ValueError if nobody has said which epoch it is."""
        if epoch is None:
            raise ValueError(f"{self}: set objective.epoch, the epochs done, before each step")
        return self.start + (self.end - self.start) * min(1.0, epoch / self.epochs)

    def __str__(self) -> str:
        return f"{{from: {self.start:g}, to: {self.end:g}, epochs: {self.epochs:g}}}"


class SubModel:
    """One sub-model: the main model's weights under an augmentation.

    Args:
        augmentation: whatever `augsub.build` takes; a ratio in it may be a :class:`Ramp` or its mapping.
        ratio: the augmentation's ratio if `augmentation` is a name, a number or a ramp.
        weight: weight of its loss, at least 0, a number or a ramp. With 0 it is not computed,
            and the main model's weight stays what it is.
        share: of the images of a micro-batch that it sees, in (0, 1]: int(B * share) of B, drawn anew.
        learn_from: a registered lesson: ``main``, ``labels``, ``ema``, ``teacher``, ``augmented_teacher`` or one's own.

    Raises:
        ValueError: for an argument out of range, or an augmentation that cannot be built.
    """

    def __init__(
        self,
        augmentation: AugmentationSpec,
        ratio: float | Ramp | Mapping[str, float] | None = None,
        weight: float | Ramp | Mapping[str, float] = 0.5,
        share: float = 1.0,
        learn_from: str = "main",
    ) -> None:
        if ratio is not None and not isinstance(augmentation, str):
            raise ValueError(f"ratio can only be given beside an augmentation's name, not beside {augmentation!r}")
        spec = augmentation if ratio is None else {"name": augmentation, "ratio": ratio}
        self._spec = _with_ramps(spec)
        self._weight = _ramp_or_number(weight)
        for epoch in (START, END):
            checked_weight("weight of a sub-model", _at(self._weight, epoch))
        if not _is_number(share) or not 0 < share <= 1:
            raise ValueError(f"share of a sub-model = {share!r}, allowed is a number in (0, 1]")
        self.share, self.learn_from = float(share), learn_from
        self._is_constant = _at(self._spec, START) == _at(self._spec, END)
        self._at_end = build(_at(self._spec, END))
        self._at_start = self.at(START)

    @property
    def augmentation(self) -> SubModelAugmentation:
        """The augmentation at the end of the training."""
        return self._at_end

    @property
    def weight(self) -> float:
        """The weight at the end of the training."""
        return self.weight_at(END)

    def at(self, epoch: float | None) -> SubModelAugmentation:
        """The augmentation at an epoch: always the same one where its ratio is a number."""
        return self._at_end if self._is_constant else build(_at(self._spec, epoch))

    def weight_at(self, epoch: float | None) -> float:
        """The weight at an epoch."""
        return float(_at(self._weight, epoch))

    def images_of(self, batch: int) -> int:
        """How many of `batch` images it sees; ValueError if there would be none."""
        count = int(batch * self.share)
        if count < 1:
            raise ValueError(f"share of a sub-model = {self.share:g} leaves none of {batch} images")
        return count

    @property
    def is_computed(self) -> bool:
        """Whether it has a weight at any time."""
        return self.weight_at(START) > 0 or self.weight > 0

    def __str__(self) -> str:
        """In a few characters: "masking 0.5, share 0.5"."""
        what = str(self._at_end) if self._is_constant else f"{self._at_start} to {self._at_end}"
        return what + (f", share {self.share:g}" if self.share < 1 else "")

    def __repr__(self) -> str:
        parts = [repr(self._at_end)] if self._is_constant else [f"{self._at_start!r} to {self._at_end!r}"]
        parts.append(f"weight={self._weight}")
        parts += [f"share={self.share:g}"] if self.share < 1 else []
        parts += [f"learn_from={self.learn_from!r}"] if self.learn_from != "main" else []
        return f"SubModel({', '.join(parts)})"


def checked_weight(what: str, weight: float) -> float:
    """The weight of a loss; ValueError if it is none."""
    if not _is_number(weight) or not 0 <= weight < float("inf"):
        raise ValueError(f"{what} = {weight!r}, allowed is a finite number, at least 0")
    return float(weight)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ramp_or_number(value: Any) -> Any:
    """A ramp in the place of its mapping; anything else as it is, to be refused where its range is known."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"from", "to", "epochs"}:
        raise ValueError(f"{dict(value)} is no ramp: allowed is {{from: 0.1, to: 0.5, epochs: 20}}")
    return Ramp(value["from"], value["to"], value["epochs"])


def _with_ramps(spec: Any) -> Any:
    """An augmentation's description with ramps for its ratios."""
    if isinstance(spec, Mapping):
        return {key: _ramp_or_number(value) if key == "ratio" else value for key, value in spec.items()}
    return (
        [_with_ramps(member) for member in spec] if isinstance(spec, Sequence) and not isinstance(spec, str) else spec
    )


def _at(spec: Any, epoch: float | None) -> Any:
    """A number, or an augmentation's description, with the values that its ramps have at an epoch."""
    if isinstance(spec, Ramp):
        return spec.at(epoch)
    if isinstance(spec, Mapping):
        return {key: _at(value, epoch) for key, value in spec.items()}
    return [_at(member, epoch) for member in spec] if isinstance(spec, list) else spec
