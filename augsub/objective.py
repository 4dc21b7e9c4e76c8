"""The training objective of MaskSub (arXiv 2306.11339, section 3): labels teach the main model,
the main model teaches the sub-models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from augsub.augmentation import SubModelAugmentation
from augsub.patching import find_patched
from augsub.registry import AugmentationSpec, build
from augsub.teaching import Criterion, TargetForm, check_first_batch, main_loss, teaching_for


class SubModel:
    """One sub-model: the main model's weights under an augmentation.

    Args:
        augmentation: whatever `augsub.build` takes.
        ratio: the augmentation's ratio if `augmentation` is a name.
        weight: weight of its loss, at least 0.

    Raises:
        ValueError: for a negative weight or an augmentation that cannot be built.
    """

    def __init__(self, augmentation: AugmentationSpec, ratio: float | None = None, weight: float = 0.5) -> None:
        self.augmentation: SubModelAugmentation = build(augmentation, ratio=ratio)
        self.weight = _checked_weight("weight of a sub-model", weight)

    def __repr__(self) -> str:
        return f"SubModel({self.augmentation!r}, weight={self.weight})"


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
        main_loss: loss of the main model, scalar, unweighted.
        sub_losses: loss of each sub-model, scalars, unweighted.
        logits: logits of the main model, (B, K), detached.
    """

    loss: Tensor
    main_loss: Tensor
    sub_losses: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None


class SubModelObjective:
    """loss = main_weight * main + sum of weight_i * sub_i.

    The main model learns from `criterion` and the labels; sub-model i from the main model's own
    prediction, detached. Without sub-models it is plain training: the main weight is 1.

    Args:
        criterion: loss of (logits, targets), a scalar.
        sub_models: the sub-models, in the order of their forwards.
        main_weight: weight of the main loss, at least 0.
        targets: what sub-models learn from: `softmax`, probabilities of which one class is right, or `sigmoid`,
            of each class by itself. It follows from a cross-entropy or binary cross-entropy of torch or timm; any
            other criterion needs it.

    Raises:
        TypeError: if `sub_models` is not a sequence of `SubModel`.
        ValueError: for a weight out of range, or a criterion beside sub-models of which the form of the targets or
            the scale is not known.
    """

    def __init__(
        self,
        criterion: Criterion,
        sub_models: Sequence[SubModel] = (),
        main_weight: float = 0.5,
        targets: TargetForm | None = None,
    ) -> None:
        if not isinstance(sub_models, Sequence) or not all(isinstance(sub_model, SubModel) for sub_model in sub_models):
            raise TypeError(f"sub_models = {sub_models!r}, needed is a list of augsub.SubModel")
        self.criterion = criterion
        self.sub_models = tuple(sub_models)
        self._teaching = teaching_for(criterion, targets) if self.sub_models else None
        self._has_seen_a_batch = False
        self.main_weight = _checked_weight("main_weight", main_weight) if self.sub_models else 1.0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Check once that `model` has a site for every sub-model, and freeze what none of them uses.

        Call it before building the optimiser and before wrapping in DDP: a mask token that no
        branch uses would otherwise make DDP wait for its gradient.

        Raises:
            ValueError: if no model is patched, or it has no site for an augmentation, or DDP holds it already.
        """
        if isinstance(model, DistributedDataParallel):
            raise ValueError("DistributedDataParallel holds this model: call objective.prepare before wrapping it")
        patched = find_patched(model)
        patched._augsub.check_complete()
        used_sites = {site for sub_model in self.sub_models for site in patched._augsub.plan(sub_model.augmentation)}
        if "stem" in patched._augsub.sites:
            patched.mask_token.requires_grad_("stem" in used_sites)
        return model

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> ObjectiveOutput:
        """All branches in one graph; the caller runs ``out.loss.backward()``.

        Args:
            model: a patched model, wrapped or not, that returns logits (B, K) or, as those of
                Hugging Face, an output with `logits`.
            images: (B, C, H, W).
            targets: whatever the criterion takes: labels (B,) or soft labels (B, K).

        Raises:
            ValueError: if no model is patched, or the criterion does not take the targets or returns
                no scalar; with the first batch also if (B, K) targets are no distributions under softmax, or
                an unknown criterion is no mean. That costs a look at values, for which a GPU waits once.
        """
        branches = self.branches(model, images, targets)
        # DDP must expect one backward, and copy BatchNorm's buffers before the first forward only:
        # later, autograd would find them changed. FSDP2 asks in the backward, which is the caller's.
        with _no_sync(model):
            all_but_last = [next(branches) for _ in self.sub_models]
        return _summarise([*all_but_last, next(branches)])

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        backward: Callable[[Tensor], None] = Tensor.backward,
        sync: bool = True,
    ) -> ObjectiveOutput:
        """Forward and backward, branch by branch, so that one graph is alive at a time.

        The gradients are those of ``self(model, images, targets).loss.backward()``. Under
        DistributedDataParallel and FSDP2 they are reduced once, in the backward of the last branch.
        Until then every process of FSDP2 holds whole gradients, not its shard of them.

        Args:
            model: as for `__call__`.
            images: as for `__call__`.
            targets: as for `__call__`.
            backward: called with each branch's weighted loss, for example to scale it, or to divide it by the
                number of micro-batches of gradient accumulation.
            sync: False on all but the last micro-batch of gradient accumulation: no reduction at all.
                Under FSDP2 this alone decides, whatever `set_requires_gradient_sync` was called with.
        """
        finished: list[Branch] = []
        branches = self.branches(model, images, targets)
        for to_come in reversed(range(1 + len(self.sub_models))):
            with _gradient_sync(model, enabled=sync and not to_come):
                branch = next(branches)
                backward(branch.weight * branch.loss)
            finished.append(Branch(branch.logits.detach(), branch.loss.detach(), branch.weight))
            del branch  # its graph
        return _summarise(finished)

    def branches(self, model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[Branch]:
        """The main model, then each sub-model. A branch's graph may be freed before the next is asked for.

        Args:
            model: as for `__call__`.
            images: as for `__call__`.
            targets: as for `__call__`.
        """
        if self.sub_models and isinstance(model, nn.Module):
            find_patched(model)
        logits = _logits_of(model(images))
        loss = main_loss(self.criterion, logits, targets)
        if self._teaching is not None and not self._has_seen_a_batch and not torch.compiler.is_compiling():
            check_first_batch(self._teaching, self.criterion, logits, targets, loss)
            self._has_seen_a_batch = True
        yield Branch(logits, loss, self.main_weight)

        if self._teaching is None:
            return
        target = self._teaching.target(logits)
        del logits, loss
        for sub_model in self.sub_models:
            sub_logits = _logits_of(model(images, augsub=sub_model.augmentation))
            yield Branch(sub_logits, self._teaching.loss(sub_logits, target), sub_model.weight)


def _summarise(branches: Sequence[Branch]) -> ObjectiveOutput:
    main, *subs = branches
    loss = torch.stack([branch.weight * branch.loss for branch in branches]).sum()
    return ObjectiveOutput(loss, main.loss, [branch.loss for branch in subs], main.logits.detach())


@contextmanager
def _gradient_sync(model: Any, enabled: bool) -> Iterator[None]:
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
        with _no_sync(model):
            yield


def _no_sync(model: Any) -> AbstractContextManager[None]:
    """DDP's, where a forward does not prepare a reduction."""
    context: AbstractContextManager[None] = model.no_sync() if hasattr(model, "no_sync") else nullcontext()
    return context


def _checked_weight(what: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"{what} = {weight!r}, allowed is a finite number, at least 0")
    return float(weight)


def _logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the objective needs logits (B, K) from the model, not a {type(logits).__name__}; "
            "a distilled model must return one output: set_distilled_training(False)"
        )
    return logits
