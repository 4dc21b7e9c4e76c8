"""What sub-models learn from: the form, the scale and the minimum of their loss, under all kinds of criteria."""

from __future__ import annotations

from functools import partial

import pytest
import timm.loss
import torch
from torch import nn
from torch.nn import functional as F

import augsub

BATCH, CLASSES = 6, 4
HALF = augsub.SubModel("masking", ratio=0.5)
WEIGHTS = torch.tensor([5.0, 1.0, 0.2, 3.0])


def asymmetric(logits, targets):
    p = logits.sigmoid()
    return -(targets * p.log() + p**2 * (1 - targets) * (1 - p).log()).mean()


class Around(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, logits, targets):
        return self.criterion(logits, targets)


class BatchMean(nn.CrossEntropyLoss):
    """A mean over images that calls itself one over the batch, as nn.KLDivLoss does."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "batchmean"

    def forward(self, logits, targets):
        return F.cross_entropy(logits, targets)


BCE_SUM = partial(F.binary_cross_entropy_with_logits, reduction="sum")
KNOWN = {
    "softmax": [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
        nn.CrossEntropyLoss(reduction="sum"),
        F.cross_entropy,
        partial(F.cross_entropy, label_smoothing=0.1),
        timm.loss.LabelSmoothingCrossEntropy(0.3),
        timm.loss.AsymmetricLossSingleLabel(),
    ],
    "sigmoid": [
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        nn.BCEWithLogitsLoss(weight=WEIGHTS, reduction="sum"),
        partial(BCE_SUM, pos_weight=WEIGHTS),
        torch.compile(nn.BCEWithLogitsLoss(), backend="eager"),
        torch.compile(F.binary_cross_entropy_with_logits, backend="eager"),
        timm.loss.BinaryCrossEntropy(smoothing=0.1, target_threshold=0.2, pos_weight=WEIGHTS),
        timm.loss.BinaryCrossEntropy(smoothing=0.0, sum_classes=True),
        nn.MultiLabelSoftMarginLoss(weight=WEIGHTS),
        timm.loss.AsymmetricLossMultiLabel(),
    ],
}
ASKED = [
    (lambda logits, targets: F.binary_cross_entropy_with_logits(logits, targets), "sigmoid"),
    (Around(nn.BCEWithLogitsLoss(pos_weight=WEIGHTS)), "sigmoid"),
    (asymmetric, "sigmoid"),
    (lambda logits, targets: F.nll_loss(logits.log_softmax(1), targets), "softmax"),
]


def labels_for(form: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if form == "softmax":
        return torch.randint(CLASSES, (BATCH,), generator=generator)
    return torch.randint(2, (BATCH, CLASSES), generator=generator).float()


def losses(criterion, main, sub, labels, targets=None) -> augsub.objective.ObjectiveOutput:
    """Of a model that gives these logits (B, K) as main model and as sub-model."""
    objective = augsub.SubModelObjective(criterion, [HALF], targets=targets)
    return objective(lambda images, augsub=None: main if augsub is None else sub, torch.empty(0), labels)


@pytest.mark.parametrize(
    ("criterion", "targets", "form"),
    [
        *((criterion, None, form) for form, criteria in KNOWN.items() for criterion in criteria),
        *((criterion, form, form) for criterion, form in ASKED),
    ],
)
def test_the_loss_is_least_where_the_sub_model_predicts_what_its_teacher_does(criterion, targets, form):
    torch.manual_seed(0)
    main = 2 * torch.randn(BATCH, CLASSES)
    equal = main.clone().requires_grad_()
    least = losses(criterion, main, equal, labels_for(form), targets).sub_losses[0]
    (gradient,) = torch.autograd.grad(least, equal)
    torch.testing.assert_close(gradient, torch.zeros_like(main), rtol=0, atol=1e-6)
    for direction in torch.randn(5, BATCH, CLASSES):
        assert losses(criterion, main, main + 0.3 * direction, labels_for(form), targets).sub_losses[0] > least


@pytest.mark.parametrize(
    ("criterion", "probabilities"),
    [
        (nn.CrossEntropyLoss(), torch.softmax),
        (nn.CrossEntropyLoss(reduction="sum"), torch.softmax),
        (BatchMean(), torch.softmax),
        (nn.BCEWithLogitsLoss(), torch.sigmoid),
        (BCE_SUM, torch.sigmoid),
        (timm.loss.BinaryCrossEntropy(smoothing=0.0), torch.sigmoid),
        (timm.loss.BinaryCrossEntropy(smoothing=0.0, sum_classes=True), torch.sigmoid),
        (nn.MultiLabelSoftMarginLoss(), torch.sigmoid),
    ],
)
def test_both_losses_are_on_one_scale(criterion, probabilities):
    """Of the same logits and the same soft targets they are the same number."""
    torch.manual_seed(0)
    main, sub = torch.randn(2, BATCH, CLASSES)
    target = main.softmax(1) if probabilities is torch.softmax else main.sigmoid()
    torch.testing.assert_close(losses(criterion, main, sub, target).sub_losses[0], criterion(sub, target))


@pytest.mark.parametrize(
    ("criterion", "targets", "message"),
    [
        *((criterion, None, r"not known: say so by targets='softmax' .* or targets='") for criterion, _ in ASKED),
        (nn.BCEWithLogitsLoss(), "softmax", "targets = 'softmax': BCEWithLogitsLoss has sigmoid targets"),
        (asymmetric, "sigmoids", "targets = 'sigmoids', allowed is 'softmax' or 'sigmoid'"),
        (nn.MultiLabelSoftMarginLoss(reduction="sum"), None, "reduction = 'sum' has no counterpart"),
    ],
)
def test_a_form_that_is_unknown_or_contradicts_the_criterion_is_refused(criterion, targets, message):
    with pytest.raises(ValueError, match=message):
        augsub.SubModelObjective(criterion, [HALF], targets=targets)
    augsub.SubModelObjective(criterion)  # plain training needs none


@pytest.mark.parametrize("rows", [[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]], [[1.5, -0.5, 0.0, 0.0]]])
def test_rows_that_are_no_distributions_are_refused_under_softmax(rows):
    labels = torch.tensor(rows).repeat(BATCH, 1)
    logits = torch.randn(2, BATCH, CLASSES)
    with pytest.raises(
        ValueError, match=r"targets \(6, 4\) of CrossEntropyLoss must be distributions, row 0 has the sum"
    ):
        losses(nn.CrossEntropyLoss(), *logits, labels)
    losses(nn.CrossEntropyLoss(), *logits, torch.full((BATCH, CLASSES), 0.25).bfloat16().float())
    losses(nn.BCEWithLogitsLoss(), *logits, labels)


@pytest.mark.parametrize(
    ("criterion", "targets", "axis"),
    [
        (lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"), "softmax", "images"),
        (lambda logits, targets: -(targets * F.logsigmoid(logits)).sum(), "sigmoid", "images"),
        (lambda logits, targets: -(targets * F.logsigmoid(logits)).sum(1).mean(), "sigmoid", "classes"),
    ],
)
def test_a_criterion_on_another_scale_must_say_so(criterion, targets, axis):
    logits = torch.randn(2, BATCH, CLASSES)
    with pytest.raises(ValueError, match=f"<lambda> adds up over the {axis}, of which sub-models learn by the mean"):
        losses(criterion, *logits, labels_for(targets), targets)
    criterion.reduction = "batchmean" if axis == "classes" else "sum"
    out = losses(criterion, *logits, labels_for(targets), targets)
    per_image = (
        F.cross_entropy(logits[1], logits[0].softmax(1), reduction="none")
        if targets == "softmax"
        else (F.binary_cross_entropy_with_logits(logits[1], logits[0].sigmoid(), reduction="none").sum(1))
    )
    torch.testing.assert_close(out.sub_losses[0], per_image.mean() if axis == "classes" else per_image.sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), timm.loss.LabelSmoothingCrossEntropy(0.1)])
def test_labels_of_any_integer_type_are_the_same_classes(dtype, criterion):
    logits, labels = torch.randn(2, BATCH, CLASSES), labels_for("softmax")
    out = losses(criterion, *logits, labels.to(dtype))
    assert torch.equal(out.main_loss, criterion(logits[0], labels))
