"""What sub-models learn from, which images they see, and how their ratios and weights go over training."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F

import augsub
from tests.conftest import tiny_resnet, tiny_vit

CE = nn.CrossEntropyLoss()


def gradients(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Of a loss, or those that are there; then none are."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * max(1.0, float(expected[name].norm())), name


def seeded(seed: int = 3) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return augsub.patch(tiny_vit())


@pytest.fixture
def forwards(model) -> list[int]:
    """How many images each forward of the model had."""
    seen: list[int] = []
    model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_labels_train_the_masked_model_directly_and_no_clean_branch_is_computed(model, images, labels, forwards):
    sub_model = augsub.SubModel("masking", ratio=0.5, weight=1.0, learn_from="labels")
    objective = augsub.SubModelObjective(CE, [sub_model], main_weight=0)
    seeded()
    out = objective.backward(model, images, labels)
    found = gradients(model)
    assert forwards == [4]
    seeded()
    loss = CE(model(images, augsub="masking", augsub_ratio=0.5), labels)
    assert out.loss == out.main_loss == loss and out.sub_losses == [loss]
    assert_equal(found, gradients(model, loss))


def test_a_teacher_without_augmentation_is_timms_distillation(model, images, labels):
    torch.manual_seed(9)
    teacher = tiny_vit()
    for one in (model, teacher):
        one.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    unchanged = augsub.SubModel("masking", ratio=0, weight=0.7, learn_from="teacher")
    objective = augsub.SubModelObjective(CE, [unchanged], main_weight=0.3, teacher=teacher)
    out = objective(model, images, labels)
    found = gradients(model, out.loss)
    task = LogitDistillationTask(model, teacher, CE, task_loss_weight=0.3, device=torch.device("cpu"), verbose=False)
    assert_equal(found, gradients(model, task(images, labels)["loss"]))
    entropy = torch.distributions.Categorical(logits=teacher(images)).entropy().mean()
    assert out.loss.item() == pytest.approx((task(images, labels)["loss"] + 0.7 * entropy).item(), abs=1e-6)
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_a_moving_average_teaches(model, images, labels, form):
    torch.manual_seed(9)
    average = tiny_vit()
    criterion = CE if form == "softmax" else BinaryCrossEntropy()
    sub_model = augsub.SubModel("masking", ratio=0.5, learn_from="ema")
    out = augsub.SubModelObjective(criterion, [sub_model], ema=average)(model, *seeded_batch(images, labels))
    _, logits = seeded(), model(images, augsub="masking", augsub_ratio=0.5)
    if form == "softmax":
        expected = F.cross_entropy(logits, average(images).softmax(1))
    else:
        expected = F.binary_cross_entropy_with_logits(logits, average(images).sigmoid())
    torch.testing.assert_close(out.sub_losses[0], expected)


def test_who_teaches_stays_in_evaluation_mode(model, images, labels):
    """Also as a part of a module that is put into training mode, as a LightningModule is."""
    average = tiny_resnet()
    statistics = [buffer.clone() for buffer in average.buffers()]
    sub_model = augsub.SubModel("masking", ratio=0.5, learn_from="ema")
    objective = augsub.SubModelObjective(CE, [sub_model], ema=average)
    torch.nn.ModuleList([model, average]).train()
    objective.backward(model, images, labels)
    assert model.training and not average.training
    assert all(torch.equal(*pair) for pair in zip(average.buffers(), statistics, strict=True))


def seeded_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    seeded()
    return images, labels


def test_an_augmented_teacher_sees_what_the_sub_model_sees(model, images, labels):
    """A copy of the model teaches nothing then, and the sub-model's random numbers go on as without it."""
    sub_model = augsub.SubModel([{"name": "masking", "ratio": 0.5}, {"name": "drop_path", "ratio": 0.5}], weight=1.0,
                                learn_from="augmented_teacher")  # fmt: skip
    objective = augsub.SubModelObjective(CE, [sub_model], main_weight=0, teacher=copy.deepcopy(model))
    seeded()
    found = gradients(model, objective(model.eval(), images, labels).loss)
    after = torch.rand(3)
    assert max(gradient.abs().max() for gradient in found.values()) < 1e-6
    seeded()
    model(images, augsub=sub_model.augmentation)
    assert torch.equal(torch.rand(3), after)


class TestShare:
    @pytest.mark.parametrize(("share", "seen"), [(1.0, 4), (0.5, 2), (0.3, 1)])
    def test_so_many_images_are_seen(self, model, images, labels, forwards, share, seen):
        objective = augsub.SubModelObjective(CE, [augsub.SubModel("masking", ratio=0.5, share=share)])
        objective.backward(model, images, labels)
        assert forwards == [4, seen]

    @pytest.mark.parametrize("lesson", ["main", "labels", "ema"])
    def test_the_loss_is_the_mean_over_them(self, model, images, labels, lesson):
        sub_model = augsub.SubModel("masking", ratio=0.5, share=0.5, learn_from=lesson)
        average = tiny_vit().eval()
        objective = augsub.SubModelObjective(CE, [sub_model], ema=average)
        seeded()
        found = objective(model, images, labels).sub_losses[0]
        seeded()
        seen = torch.randperm(4)[:2]
        logits = model(images[seen], augsub="masking", augsub_ratio=0.5)
        targets = {"main": model(images)[seen].softmax(1), "ema": average(images[seen]).softmax(1)}
        torch.testing.assert_close(found, F.cross_entropy(logits, targets.get(lesson, labels[seen])))

    def test_a_share_that_leaves_no_image_is_an_error(self, model, images, labels):
        objective = augsub.SubModelObjective(CE, [augsub.SubModel("masking", ratio=0.5, share=0.2)])
        with pytest.raises(ValueError, match=r"share of a sub-model = 0\.2 leaves none of 4 images"):
            objective(model, images, labels)


RAMP = {"from": 0.0, "to": 0.5, "epochs": 10}


class TestRamps:
    def test_a_ramp_is_a_line_and_stays_at_its_end(self):
        ramp = augsub.Ramp(0.1, 0.5, epochs=20)
        assert [round(ramp.at(epoch), 6) for epoch in (0, 5, 12.5, 20, 300)] == [0.1, 0.2, 0.35, 0.5, 0.5]

    @pytest.mark.parametrize("spec", ["name", "mapping", "list"])
    def test_the_ratio_is_that_of_the_epoch(self, model, images, labels, spec):
        given = {"name": "masking", "mapping": {"name": "masking", "ratio": RAMP}}
        given["list"] = [given["mapping"], {"name": "drop_path", "ratio": 0.1}]
        sub_model = augsub.SubModel(given[spec], ratio=augsub.Ramp(0.0, 0.5, 10) if spec == "name" else None)
        objective = augsub.SubModelObjective(CE, [sub_model])
        tokens: list[int] = []
        model.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1] - 1))
        for objective.epoch in (0.0, 5.0, 10.0, 99.0):
            objective(model, images, labels)
        assert tokens[1::2] == [16, 12, 8, 8]
        assert sub_model.augmentation.members[0].ratio == 0.5

    def test_the_weight_is_that_of_the_epoch(self, model, images, labels):
        objective = augsub.SubModelObjective(CE, [augsub.SubModel("masking", ratio=0.5, weight=RAMP)])
        with pytest.raises(ValueError, match=r"set objective\.epoch, the epochs done, before each step"):
            objective(model, images, labels)
        for objective.epoch, weight in ((0.0, 0.0), (5.0, 0.25), (20.0, 0.5)):
            out = objective(model, images, labels)
            torch.testing.assert_close(out.loss, 0.5 * out.main_loss + weight * out.sub_losses[0])

    def test_constant_ones_give_the_bits_of_numbers(self, model, images, labels):
        found = []
        for ratio, weight in ((0.5, 0.5), (augsub.Ramp(0.5, 0.5, 1), augsub.Ramp(0.5, 0.5, 3))):
            objective = augsub.SubModelObjective(CE, [augsub.SubModel("masking", ratio=ratio, weight=weight)])
            objective.epoch = 0.5
            seeded()
            found.append(gradients(model, objective(model, images, labels).loss))
        assert_equal(*found, tolerance=0)


def test_a_lesson_of_ones_own(model, images, labels):
    try:

        @augsub.register_lesson("hard_labels")
        class HardLabels(augsub.Lesson):
            needs_main = True

            def loss(self, logits: Tensor, step: augsub.Step) -> Tensor:
                return F.cross_entropy(logits, step.main_logits.argmax(1))

        objective = augsub.SubModelObjective(
            CE, [augsub.SubModel("masking", ratio=0.5, learn_from="hard_labels")], main_weight=0
        )
        seeded()
        out = objective.backward(model, images, labels)
        seeded()
        logits = model(images, augsub="masking", augsub_ratio=0.5)
        torch.testing.assert_close(out.sub_losses[0], F.cross_entropy(logits, model(images).argmax(1)))
    finally:
        augsub.LESSONS._obj_map.pop("hard_labels", None)


class Dense(nn.Module):
    """A map of logits (B, K, H, W), or a sequence (B, K, L)."""

    def __init__(self, sequence: bool) -> None:
        super().__init__()
        self.features, self.sequence = (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)),
            sequence,
        )

    def forward(self, images: Tensor) -> Tensor:
        logits = self.features(images)
        return logits.flatten(2) if self.sequence else logits


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_dense_predictions_are_taught_position_by_position(images, sequence, form):
    model = augsub.patch(Dense(sequence))
    places = (4, 32 * 32) if sequence else (4, 32, 32)
    labels = torch.randint(5, places)
    targets = labels if form == "softmax" else F.one_hot(labels).movedim(-1, 1).float()
    criterion = CE if form == "softmax" else nn.BCEWithLogitsLoss()
    seeded()
    masking = {"name": "masking", "ratio": 0.5, "cell": 8}
    out = augsub.SubModelObjective(criterion, [augsub.SubModel(masking)])(model, images, targets)
    seeded()
    teacher, logits = model(images), model(images, augsub=masking)
    if form == "softmax":
        expected = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    else:
        expected = F.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
    torch.testing.assert_close(out.sub_losses[0], expected)
    torch.testing.assert_close(out.main_loss, criterion(teacher, targets))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: masksub(learn_from="teachr"), r"unknown lesson 'teachr', did you mean 'teacher'\?; known: "),
        (lambda: masksub(share=0), r"share of a sub-model = 0, allowed is a number in \(0, 1\]"),
        (lambda: masksub(share=1.5), r"share of a sub-model = 1\.5"),
        (lambda: masksub(ratio={"from": 0.1, "to": 1.0, "epochs": 5}), r"masking: ratio = 1\.0, allowed"),
        (lambda: masksub(ratio={"from": -0.1, "to": 0.5, "epochs": 5}), r"masking: ratio = -0\.1, allowed"),
        (lambda: masksub(ratio={"from": 0.1, "to": 0.5}), "is no ramp: allowed is {from: 0.1, to: 0.5, epochs: 20}"),
        (lambda: masksub(ratio=augsub.Ramp(0.1, 0.5, 0)), "epochs above 0"),
        (lambda: masksub(weight=augsub.Ramp(0.1, -0.5, 1)), r"weight of a sub-model = -0\.5"),
        (lambda: augsub.SubModelObjective(CE, [augsub.SubModel("masking", weight=0)], 0), "nothing learns"),
    ],
)
def test_bad_arguments_are_named(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def masksub(**arguments) -> augsub.SubModelObjective:
    return augsub.SubModelObjective(CE, [augsub.SubModel("masking", **{"ratio": 0.5, **arguments})])


@pytest.mark.parametrize("name", ["teacher", "ema"])
def test_a_teacher_that_is_not_there_is_an_error(model, images, labels, name):
    with pytest.raises(ValueError, match=f"a sub-model learns from {name}, and there is no {name}="):
        masksub(learn_from=name)(model, images, labels)


def test_an_augmented_teacher_must_be_patched(model, images, labels):
    sub_model = augsub.SubModel("masking", ratio=0.5, learn_from="augmented_teacher")
    objective = augsub.SubModelObjective(CE, [sub_model], teacher=tiny_resnet().eval())
    with pytest.raises(ValueError, match=r"ResNet is not patched: call augsub\.patch"):
        objective(model, images, labels)


@pytest.mark.slow
def test_a_compiled_model_needs_the_draws_of_its_augmented_teacher(model, images, labels):
    sub_model = augsub.SubModel("masking", ratio=0.5, weight=1.0, learn_from="augmented_teacher")
    objective = augsub.SubModelObjective(CE, [sub_model], main_weight=0, teacher=copy.deepcopy(model))
    compiled = torch.compile(model.eval())
    with pytest.raises(ValueError, match=r"the model is compiled and would see other parts .*fallback_random = True"):
        objective(compiled, images, labels)
    with torch._inductor.config.patch(fallback_random=True):
        found = gradients(model, objective(compiled, images, labels).loss)
    assert max(gradient.abs().max() for gradient in found.values()) < 1e-5


def test_a_teacher_of_other_classes_is_refused(model, images, labels):
    sub_model = augsub.SubModel("masking", ratio=0.5, learn_from="teacher")
    objective = augsub.SubModelObjective(CE, [sub_model], teacher=tiny_resnet().eval())
    objective._models["teacher"].fc = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"the teacher gives logits \(4, 7\), the sub-model \(4, 10\)"):
        objective(model, images, labels)


def test_a_sub_model_without_weight_is_not_computed(model, images, labels, forwards):
    weightless = augsub.SubModel("masking", ratio=0.5, weight=0)
    out = augsub.SubModelObjective(CE, [weightless], main_weight=0.5).backward(model, images, labels)
    assert forwards == [4] and out.sub_losses == [] and out.loss == 0.5 * out.main_loss
