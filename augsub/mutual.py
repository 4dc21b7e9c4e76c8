"""Objectives without a clean branch, in which sub-models teach each other: CoSub and R-Drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from augsub.objective import Objective, ObjectiveOutput, gradient_sync, no_sync, register_objective
from augsub.sub_model import START, SubModel, checked_weight
from augsub.teaching import Criterion, TargetForm, Teaching, main_loss, teaching_for


class MutualObjective(Objective):
    """Two sub-models or more, each of which learns from the labels and from all others.

    Each needs the others' logits, so that all branches are in one graph, and one backward follows.
    Weights, shares and lessons of the sub-models have no meaning here.

    Args:
        criterion: loss of (logits, targets), a scalar.
        sub_models: two or more.
        targets: as for `SubModelObjective`.

    Raises:
        TypeError: if `sub_models` is not a sequence of `SubModel`.
        ValueError: for fewer than two sub-models, one with a weight, share or lesson of its own, or a criterion of
            which the form of the targets or the scale is not known.
    """

    branch_by_branch = False
    _teaching: Teaching

    def __init__(self, criterion: Criterion, sub_models: Sequence[SubModel], targets: TargetForm | None = None) -> None:
        super().__init__(criterion, sub_models)
        for sub_model in sub_models:
            weights = (sub_model.weight_at(START), sub_model.weight)
            if (*weights, sub_model.share, sub_model.learn_from) != (0.5, 0.5, 1.0, "main"):
                raise ValueError(
                    f"{type(self).__name__}: {sub_model} must not have a weight, share or lesson of its own"
                )
        if len(sub_models) < 2:
            raise ValueError(f"{type(self).__name__} needs two sub-models or more, not {len(sub_models)}")
        self._teaching = teaching_for(criterion, targets)

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> ObjectiveOutput:
        *first, last = [sub_model.at(self.epoch) for sub_model in self.sub_models]
        with no_sync(model):
            logits = [self._sub_logits(model, images, augmentation) for augmentation in first]
        logits.append(self._sub_logits(model, images, last))
        losses = [main_loss(self.criterion, of_one, targets) for of_one in logits]
        self._check_first_batch(logits[0], targets, losses[0])
        from_labels = torch.stack(losses).mean()
        from_others = [
            torch.stack([self.mutual_loss(one, other) for other in logits if other is not one]).mean() for one in logits
        ]
        loss = self.combined(from_labels, torch.stack(from_others).mean())
        return ObjectiveOutput(loss, from_labels, from_others, logits[0].detach())

    def backward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        backward: Callable[[Tensor], None] = Tensor.backward,
        sync: bool = True,
    ) -> ObjectiveOutput:
        with gradient_sync(model, enabled=sync):
            out = self(model, images, targets)
            backward(out.loss)
        detached = [loss.detach() for loss in out.sub_losses]
        return ObjectiveOutput(out.loss.detach(), out.main_loss.detach(), detached, out.logits)

    def mutual_loss(self, logits: Tensor, others: Tensor) -> Tensor:
        """What one sub-model learns from another, a scalar, given the logits (B, K) of both."""
        raise NotImplementedError

    def combined(self, from_labels: Tensor, from_others: Tensor) -> Tensor:
        """The loss, of the means over sub-models and over their pairs."""
        raise NotImplementedError


@register_objective("cosub")
class CoSubObjective(MutualObjective):
    """Co-training of sub-models (arXiv 2212.04884): for two of them, and sg the stopped gradient,

    loss = 1/4 [b(o1, y) + b(o2, y) + b(o1, p(sg o2)) + b(o2, p(sg o1))],

    where b is the criterion, and p sigmoid or softmax as it has it.
    """

    def mutual_loss(self, logits: Tensor, others: Tensor) -> Tensor:
        return self._teaching.loss(logits, self._teaching.target(others))

    def combined(self, from_labels: Tensor, from_others: Tensor) -> Tensor:
        return (from_labels + from_others) / 2


@register_objective("rdrop")
class RDropObjective(MutualObjective):
    """R-Drop (arXiv 2106.14448): for two sub-models, with gradients through both predictions p of the divergences,

    loss = 1/2 [CE(o1, y) + CE(o2, y)] + alpha/4 [KL(p1 || p2) + KL(p2 || p1)].

    Args:
        criterion: loss of (logits, targets), a scalar.
        sub_models: two or more.
        alpha: weight of the divergences, at least 0.
        targets: as for `SubModelObjective`.
    """

    def __init__(
        self,
        criterion: Criterion,
        sub_models: Sequence[SubModel],
        alpha: float = 1.0,
        targets: TargetForm | None = None,
    ) -> None:
        super().__init__(criterion, sub_models, targets)
        self.alpha = checked_weight("alpha", alpha)

    def mutual_loss(self, logits: Tensor, others: Tensor) -> Tensor:
        return self._teaching.divergence(logits, others)

    def combined(self, from_labels: Tensor, from_others: Tensor) -> Tensor:
        return from_labels + self.alpha / 2 * from_others
