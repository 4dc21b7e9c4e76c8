"""CoSub and R-Drop beside their formulas, written out for two sub-models."""

from __future__ import annotations

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

import augsub
from augsub.integrations.timm import SubModelTask
from tests.conftest import tiny_vit

CRITERIA = {"softmax": nn.CrossEntropyLoss(), "sigmoid": BinaryCrossEntropy(smoothing=0.0)}
PATHS = [augsub.SubModel("drop_path", ratio=0.3)] * 2
ALPHA = 2.5


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return augsub.patch(tiny_vit())


def cosub(o1: Tensor, o2: Tensor, y: Tensor, form: str) -> Tensor:
    if form == "softmax":
        b, p = F.cross_entropy, lambda logits: logits.softmax(1)
    else:
        b, p = F.binary_cross_entropy_with_logits, torch.sigmoid
        y = F.one_hot(y, 10).float()
    return (b(o1, y) + b(o2, y) + b(o1, p(o2.detach())) + b(o2, p(o1.detach()))) / 4


def rdrop(o1: Tensor, o2: Tensor, y: Tensor, form: str) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        if form == "softmax":
            return F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True)
        p, q = torch.distributions.Bernoulli(logits=a), torch.distributions.Bernoulli(logits=b)
        return torch.distributions.kl_divergence(p, q).mean()

    ce = CRITERIA[form]
    return (ce(o1, y) + ce(o2, y)) / 2 + ALPHA / 4 * (kl(o1, o2) + kl(o2, o1))


OBJECTIVES = {
    "cosub": (lambda criterion, subs: augsub.CoSubObjective(criterion, subs), cosub),
    "rdrop": (lambda criterion, subs: augsub.RDropObjective(criterion, subs, alpha=ALPHA), rdrop),
}


@pytest.mark.parametrize("form", CRITERIA)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("way", ["call", "backward"])
def test_loss_and_gradients_are_those_of_the_formula(model, images, labels, name, form, way):
    make, formula = OBJECTIVES[name]
    objective = make(CRITERIA[form], PATHS)
    objective.prepare(model)
    torch.manual_seed(3)
    if way == "call":
        out = objective(model, images, labels)
        out.loss.backward()
    else:
        out = objective.backward(model, images, labels, backward=lambda loss: (2 * loss).backward())
    factor = {"call": 1, "backward": 2}[way]
    found = {name: parameter.grad / factor for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    o1, o2 = (model(images, augsub="drop_path", augsub_ratio=0.3) for _ in range(2))
    expected = formula(o1, o2, labels, form)
    expected.backward()
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert out.main_loss.item() == pytest.approx(
        (CRITERIA[form](o1, labels) + CRITERIA[form](o2, labels)).item() / 2, abs=1e-6
    )
    assert torch.equal(out.logits, o1) and len(out.sub_losses) == 2
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-6 * max(1, parameter.grad.norm()), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_sub_models_teach_each_other_alike(model, images, labels, name):
    """The mean over all pairs, so that three times the same one is as good as twice."""
    make, _ = OBJECTIVES[name]
    same = [augsub.SubModel("masking", ratio=0.0)]
    losses = [make(CRITERIA["softmax"], same * count)(model.eval(), images, labels).loss for count in (2, 3)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda: augsub.CoSubObjective(CRITERIA["softmax"], PATHS[:1]),
            "CoSubObjective needs two sub-models or more, not 1",
        ),
        (
            lambda: augsub.CoSubObjective(CRITERIA["softmax"], [*PATHS, augsub.SubModel("drop_path", 0.1, weight=0)]),
            "must not have a weight, share or lesson of its own",
        ),
        (lambda: augsub.RDropObjective(CRITERIA["softmax"], PATHS, alpha=-1), "alpha = -1, allowed is a finite number"),
        (lambda: augsub.CoSubObjective(lambda *_: 0, PATHS), "targets"),
        *(
            (
                lambda own=own: augsub.CoSubObjective(
                    CRITERIA["softmax"], [augsub.SubModel("masking", ratio=0.5, **own)] * 2
                ),
                "must not have a weight, share or lesson of its own",
            )
            for own in (
                {"weight": 0.3},
                {"weight": augsub.Ramp(0.1, 0.5, 20)},
                {"share": 0.5},
                {"learn_from": "labels"},
            )
        ),
    ],
)
def test_bad_arguments_are_named(make, error):
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize("objective", [augsub.CoSubObjective, augsub.RDropObjective])
def test_the_first_batch_is_looked_at(model, images, labels, objective):
    def total(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")

    with pytest.raises(ValueError, match="adds up over the images, of which sub-models learn by the mean"):
        objective(total, PATHS, targets="softmax")(model, images, labels)
    with pytest.raises(ValueError, match="must be distributions, row 0 has the sum 10"):
        objective(nn.CrossEntropyLoss(), PATHS)(model, images, torch.ones(len(images), 10))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_trainers_take_these_objectives_too(model, images, labels, name):
    make, _ = OBJECTIVES[name]
    objective = make(CRITERIA["softmax"], PATHS)
    torch.manual_seed(3)
    expected = objective(model, images, labels)
    task = SubModelTask(model, objective, device=torch.device("cpu"), verbose=False)
    torch.manual_seed(3)
    found = task(images, labels)
    assert torch.equal(found["loss"], expected.loss) and torch.equal(found["main_loss"], expected.main_loss)
    assert torch.equal(found["output"], expected.logits) and len(found["sub_losses"]) == 2
