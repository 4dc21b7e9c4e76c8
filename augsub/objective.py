"""The training objective of MaskSub (arXiv 2306.11339, section 3): labels teach the main model,
the main model teaches the sub-models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from augsub.augmentation import SubModelAugmentation
from augsub.lessons import LESSONS, Labels, Step, logits_of, random_state
from augsub.named_registry import NamedRegistry
from augsub.patching import find_patched
from augsub.sub_forward import NOT_RUN
from augsub.sub_model import SubModel, checked_weight
from augsub.teaching import Criterion, TargetForm, Teaching, check_first_batch, main_loss, teaching_for


@dataclass
class Branch:
    """One forward of a step: its logits (B, K), its scalar loss, and the weight of that loss."""

    logits: Tensor
    loss: Tensor
    weight: float


@dataclass
class ObjectiveOutput:
    """What one step computed.

    Attributes:
        loss: weighted sum of all branches, scalar.
        main_loss: loss of the main model, scalar, unweighted; of the first sub-model where no main model is computed.
        sub_losses: loss of each sub-model that is computed, scalars, unweighted.
        logits: logits of the main model, (B, K), detached; or of the first sub-model, likewise.
    """

    loss: Tensor
    main_loss: Tensor
    sub_losses: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None


class Objective:
    """What all objectives have in common: sub-models, and a model that is prepared for them.

    Args:
        criterion: loss of (logits, targets), a scalar.
        sub_models: the sub-models, in the order of their forwards.

    Attributes:
        computes_main: whether a step has a clean branch, the main model's.
        branch_by_branch: whether `backward` frees the graph of a branch before it computes the next one.
        epoch: epochs done, with their fraction; whoever trains sets it before each step if a ratio or a weight is a
            :class:`augsub.Ramp`. None until then.

    Raises:
        TypeError: if `sub_models` is not a sequence of `SubModel`.
    """

    computes_main = False
    branch_by_branch = True
    replays_draws = False  # whether another model sees what a sub-model sees, by the same random numbers

    def __init__(self, criterion: Criterion, sub_models: Sequence[SubModel]) -> None:
        if not isinstance(sub_models, Sequence) or not all(isinstance(sub_model, SubModel) for sub_model in sub_models):
            raise TypeError(f"sub_models = {sub_models!r}, needed is a list of augsub.SubModel")
        self.criterion = criterion
        self.sub_models = tuple(sub_model for sub_model in sub_models if sub_model.is_computed)
        self.epoch: float | None = None
        self._teaching: Teaching | None = None
        self._has_seen_a_batch = self._has_seen_a_sub_model = False

    @property
    def num_branches(self) -> int:
        """Forwards of a step."""
        return len(self.sub_models)

    def teach_by(self, **models: nn.Module | None) -> None:
        """Other models that teach, by name: ``teacher``, ``ema``. They are put into evaluation mode."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Check once that `model` has a site for every sub-model, and freeze what none of them uses.

        Call it before building the optimiser and before wrapping in DDP: a mask token that no
        branch uses would otherwise make DDP wait for its gradient.

        Raises:
            ValueError: if no model is patched, it has no site for an augmentation, DDP holds it already, or no forward
                would update its BatchNorm's statistics.
        """
        if isinstance(model, DistributedDataParallel):
            raise ValueError("DistributedDataParallel holds this model: call objective.prepare before wrapping it")
        patched = find_patched(model)
        patched._augsub.check_complete()
        if not (self.computes_main or patched._augsub.updates_batch_norm):
            raise ValueError("update_batch_norm = False: no main model is computed, which alone would update it")
        used_sites = {site for sub_model in self.sub_models for site in patched._augsub.plan(sub_model.augmentation)}
        if "stem" in patched._augsub.sites:
            patched.mask_token.requires_grad_("stem" in used_sites)
        return model

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> ObjectiveOutput:
        """All branches in one graph; the caller runs ``out.loss.backward()``.

        Args:
            model: a patched model, wrapped or not, that returns logits (B, K) or, as those of
                Hugging Face, an output with `logits`. Dense predictions are (B, K, L) or (B, K, H, W).
            images: (B, C, H, W).
            targets: whatever the criterion takes: labels (B,) or soft labels (B, K).

        Raises:
            ValueError: if no model is patched, a ramp needs `epoch`, or the criterion does not take the targets or
                returns no scalar; with the first batch also if (B, K) targets are no distributions under softmax,
                an unknown criterion is no mean, or `model` keeps `augsub` from the patched one inside of it. That
                costs a look at values, for which a GPU waits once.
        """
        raise NotImplementedError

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        backward: Callable[[Tensor], None] = Tensor.backward,
        sync: bool = True,
    ) -> ObjectiveOutput:
        """Forward and backward; the gradients are those of ``self(model, images, targets).loss.backward()``.

        Branch by branch, so that one graph is alive at a time, where no branch needs another one's graph. Under
        DistributedDataParallel and FSDP2 the gradients are reduced once, in the last backward. Until then every process
        of FSDP2 holds whole gradients, not its shard of them.

        Args:
            model: as for `__call__`.
            images: as for `__call__`.
            targets: as for `__call__`.
            backward: called with each weighted loss, for example to scale it, or to divide it by the
                number of micro-batches of gradient accumulation.
            sync: False on all but the last micro-batch of gradient accumulation: no reduction at all.
                Under FSDP2 this alone decides, whatever `set_requires_gradient_sync` was called with.
        """
        raise NotImplementedError

    def _sub_logits(self, model: nn.Module, images: Tensor, augmentation: SubModelAugmentation) -> Tensor:
        """Logits (B, K) of a sub-model. The first time it is seen whether it was one."""
        if self._has_seen_a_sub_model or torch.compiler.is_compiling() or not isinstance(model, nn.Module):
            return logits_of(model(images, augsub=augmentation))
        patched = find_patched(model)
        patched._augsub.image_size = NOT_RUN
        logits = logits_of(model(images, augsub=augmentation))
        if patched._augsub.image_size == NOT_RUN:
            raise ValueError(
                f"{type(model).__name__} keeps augsub=… from the {type(patched).__name__} inside of it, so that no "
                "sub-model was computed: its forward must pass it on"
            )
        self._has_seen_a_sub_model = True
        return logits

    def _check_first_batch(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        if self._teaching is not None and not self._has_seen_a_batch and not torch.compiler.is_compiling():
            check_first_batch(self._teaching, self.criterion, logits, targets, loss)
            self._has_seen_a_batch = True


OBJECTIVES = NamedRegistry("AUGSUB_OBJECTIVES", "objective", Objective)
register_objective = OBJECTIVES.register_as  # class decorator: a name for ``augsub.objective`` of a configuration


@register_objective("masksub")
class SubModelObjective(Objective):
    """loss = main_weight * main + sum of weight_i * sub_i.

    The main model learns from `criterion` and the labels; sub-model i from the main model's own
    prediction, detached, or from what its `learn_from` says. Without sub-models it is plain training: the main weight
    is 1. A main model without weight, from which nobody learns, is not computed.

    Args:
        criterion: loss of (logits, targets), a scalar.
        sub_models: the sub-models, in the order of their forwards.
        main_weight: weight of the main loss, at least 0.
        targets: what sub-models learn from: `softmax`, probabilities of which one class is right, or `sigmoid`,
            of each class by itself. It follows from a cross-entropy or binary cross-entropy of torch or timm; any
            other criterion needs it.
        teacher: another model with the same classes, for ``learn_from="teacher"``. It is put into evaluation mode.
        ema: a moving average of the model, for ``learn_from="ema"``; likewise.

    Raises:
        TypeError: if `sub_models` is not a sequence of `SubModel`.
        ValueError: for a weight out of range, an unknown lesson, nothing that learns, or a criterion beside sub-models
            of which the form of the targets or the scale is not known.
    """

    def __init__(
        self,
        criterion: Criterion,
        sub_models: Sequence[SubModel] = (),
        main_weight: float = 0.5,
        targets: TargetForm | None = None,
        teacher: nn.Module | None = None,
        ema: nn.Module | None = None,
    ) -> None:
        super().__init__(criterion, sub_models)
        self.main_weight = checked_weight("main_weight", main_weight) if sub_models else 1.0
        if not (self.main_weight or self.sub_models):
            raise ValueError("nothing learns: main_weight and the weights of all sub-models are 0")
        self._lessons = [LESSONS.get(sub_model.learn_from)() for sub_model in self.sub_models]
        self.replays_draws = any(lesson.replays_draws for lesson in self._lessons)
        self.computes_main = self.main_weight > 0 or any(lesson.needs_main for lesson in self._lessons)
        self._teaching = teaching_for(criterion, targets) if self.sub_models else None
        self._models: dict[str, nn.Module] = {}
        self.teach_by(teacher=teacher, ema=ema)

    def teach_by(self, **models: nn.Module | None) -> None:
        self._models |= {name: model.eval() for name, model in models.items() if model is not None}

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> ObjectiveOutput:
        branches = self.branches(model, images, targets)
        # DDP must expect one backward, and copy BatchNorm's buffers before the first forward only:
        # later, autograd would find them changed. FSDP2 asks in the backward, which is the caller's.
        with no_sync(model):
            all_but_last = [next(branches) for _ in range(self.num_branches - 1)]
        return self._summarise([*all_but_last, next(branches)])

    @property
    def num_branches(self) -> int:
        """Forwards of a step."""
        return self.computes_main + len(self.sub_models)

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        backward: Callable[[Tensor], None] = Tensor.backward,
        sync: bool = True,
    ) -> ObjectiveOutput:
        finished: list[Branch] = []
        branches = self.branches(model, images, targets)
        for to_come in reversed(range(self.num_branches)):
            with gradient_sync(model, enabled=sync and not to_come):
                branch = next(branches)
                backward(branch.weight * branch.loss)
            finished.append(Branch(branch.logits.detach(), branch.loss.detach(), branch.weight))
            del branch  # its graph
        return self._summarise(finished)

    def branches(self, model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[Branch]:
        """The main model, then each sub-model. A branch's graph may be freed before the next is asked for.

        Args:
            model: as for `__call__`.
            images: as for `__call__`.
            targets: as for `__call__`.
        """
        if self.sub_models and isinstance(model, nn.Module):
            find_patched(model)
            if self.replays_draws:
                _check_draws(model)
        for lesson in self._lessons:
            if lesson.needs_model not in (None, *self._models):
                raise ValueError(
                    f"a sub-model learns from {lesson.needs_model}, and there is no {lesson.needs_model}=…"
                )
        main_logits = None
        if self.computes_main:
            logits = logits_of(model(images))
            loss = main_loss(self.criterion, logits, targets)
            self._check_first_batch(logits, targets, loss)
            main_logits = logits.detach()
            yield Branch(logits, loss, self.main_weight)
            del logits, loss
        for sub_model, lesson in zip(self.sub_models, self._lessons, strict=True):
            seen = chosen(images, sub_model)
            step = Step(
                criterion=self.criterion,
                teaching=cast(Teaching, self._teaching),
                images=images[seen],
                targets=targets[seen],
                main_logits=None if main_logits is None else main_logits[seen],
                augmentation=sub_model.at(self.epoch),
                models=self._models,
                random_state=random_state(images.device) if lesson.replays_draws else [],
            )
            logits = self._sub_logits(model, step.images, step.augmentation)
            loss = lesson.loss(logits, step)
            if isinstance(lesson, Labels):
                self._check_first_batch(logits, step.targets, loss)
            yield Branch(logits, loss, sub_model.weight_at(self.epoch))
            del logits, loss

    def _summarise(self, branches: Sequence[Branch]) -> ObjectiveOutput:
        loss = torch.stack([branch.weight * branch.loss for branch in branches]).sum()
        sub_losses = [branch.loss for branch in branches[self.computes_main :]]
        return ObjectiveOutput(loss, branches[0].loss, sub_losses, branches[0].logits.detach())


def _check_draws(model: nn.Module) -> None:
    """Raise ValueError if the model is compiled so that it draws other random numbers than one that is not."""
    inductor = sys.modules.get("torch._inductor.config")  # which takes a second to import
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())
    if is_compiled and not (inductor is not None and inductor.fallback_random):
        raise ValueError(
            "the model is compiled and would see other parts of the images than its teacher: set "
            "torch._inductor.config.fallback_random = True before the first step"
        )


def chosen(images: Tensor, sub_model: SubModel) -> slice | Tensor:
    """Indices of the images that a sub-model sees, drawn anew; of all without a draw."""
    if sub_model.share == 1:
        return slice(None)
    return torch.randperm(len(images), device=images.device)[: sub_model.images_of(len(images))]


@contextmanager
def gradient_sync(model: Any, enabled: bool) -> Iterator[None]:
    """Whether a backward in this context reduces gradients over the processes, if there are any."""
    if enabled:
        yield
    elif hasattr(model, "set_requires_gradient_sync"):  # an FSDPModule; DDP has no_sync
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with no_sync(model):
            yield


def no_sync(model: Any) -> AbstractContextManager[None]:
    """DDP's, where a forward does not prepare a reduction."""
    context: AbstractContextManager[None] = model.no_sync() if hasattr(model, "no_sync") else nullcontext()
    return context
