"""What a sub-model learns from: a registry of lessons, to which users add their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from augsub.augmentation import SubModelAugmentation
from augsub.named_registry import NamedRegistry
from augsub.patching import find_patched
from augsub.teaching import Criterion, Teaching, main_loss


@dataclass
class Step:
    """What a lesson may use, all of the images that the sub-model sees.

    Attributes:
        criterion: the objective's.
        teaching: targets and loss of predictions that teach, on the scale of the criterion.
        images: (B, C, H, W).
        targets: labels (B,) or soft labels (B, K).
        main_logits: of the main model, (B, K), detached; None if nobody needs them.
        augmentation: of the sub-model.
        models: other models that teach, by name: "ema", "teacher".
        random_state: what draws the same augmentation again, see `same_draws`.
    """

    criterion: Criterion
    teaching: Teaching
    images: Tensor
    targets: Tensor
    main_logits: Tensor | None
    augmentation: SubModelAugmentation
    models: dict[str, nn.Module]
    random_state: list[Tensor]

    def same_draws(self) -> Any:
        """Context in which the augmentation draws what it drew in the sub-model."""
        return _random_state(self.images.device, self.random_state)


class Lesson:
    """What a sub-model learns from. A subclass has a `loss`, and is registered by `register_lesson`.

    Attributes:
        needs_main: whether the main model must have been computed.
        needs_model: which of `SubModelObjective`'s other models it needs: "ema", "teacher" or none.
        replays_draws: whether it uses `Step.same_draws`.
    """

    needs_main = False
    needs_model: str | None = None
    replays_draws = False

    def loss(self, logits: Tensor, step: Step) -> Tensor:
        """The sub-model's loss, a scalar, given its logits (B, K) and what the step has for it."""
        raise NotImplementedError


LESSONS = NamedRegistry("AUGSUB_LESSONS", "lesson", Lesson)
register_lesson = LESSONS.register_as  # class decorator: let sub-models learn by ``learn_from=name``


@register_lesson("main")
class MainModel(Lesson):
    """The main model's own prediction (MaskSub, arXiv 2306.11339, section 3)."""

    needs_main = True

    def loss(self, logits: Tensor, step: Step) -> Tensor:
        return step.teaching.loss(logits, step.teaching.target(cast(Tensor, step.main_logits)))


@register_lesson("labels")
class Labels(Lesson):
    """The labels: with masking the paper's failing baseline (arXiv 2306.11339, section 1)."""

    def loss(self, logits: Tensor, step: Step) -> Tensor:
        return main_loss(step.criterion, logits, step.targets)


@register_lesson("teacher")
class Teacher(Lesson):
    """Another model's prediction for the whole images."""

    needs_model: str | None = "teacher"

    def loss(self, logits: Tensor, step: Step) -> Tensor:
        model = step.models[cast(str, self.needs_model)]
        if model.training:  # again, as a part of what somebody has put into training mode
            model.eval()
        teacher = self.predict(model, step)
        if teacher.shape != logits.shape:
            raise ValueError(
                f"the {self.needs_model} gives logits {tuple(teacher.shape)}, the sub-model {tuple(logits.shape)}: "
                "it must have the same classes"
            )
        return step.teaching.loss(logits, step.teaching.target(teacher))

    @torch.no_grad()
    def predict(self, model: nn.Module, step: Step) -> Tensor:
        """Logits (B, K) of the teacher."""
        return logits_of(model(step.images))


@register_lesson("ema")
class MovingAverage(Teacher):
    """The prediction of a moving average of the model's own weights."""

    needs_model = "ema"


@register_lesson("augmented_teacher")
class AugmentedTeacher(Teacher):
    """The prediction of another patched model that sees what the sub-model sees, with the same draws (MaskedKD).

    They are the same parts of the image where both models divide it alike and neither draws before, for dropout of its
    positions for example. A compiled model needs ``torch._inductor.config.fallback_random``: else it draws others.
    """

    replays_draws = True

    @torch.no_grad()
    def predict(self, model: nn.Module, step: Step) -> Tensor:
        find_patched(model)
        with step.same_draws():
            return logits_of(model(step.images, augsub=step.augmentation))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the objective needs logits (B, K) from the model, not a {type(logits).__name__}; "
            "a distilled model must return one output: set_distilled_training(False)"
        )
    return logits


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the generators from which a model on the device draws."""
    of_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(*_which(device))]
    return [torch.get_rng_state(), *of_device]


def _which(device: torch.device) -> list[torch.device]:
    """What a device's module wants to be told of it: Apple's has one only."""
    return [] if device.type == "mps" else [device]


@contextmanager
def _random_state(device: torch.device, state: list[Tensor]) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.set_rng_state(state[0])
        if devices:
            torch.get_device_module(device).set_rng_state(state[1], *_which(device))
        yield
