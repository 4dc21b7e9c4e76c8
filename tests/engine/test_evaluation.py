"""Meters against independent computations, and the same evaluation whatever the batches and processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

import augsub
from engine.data import IGNORED
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.evaluation import evaluate, measure
from engine.evaluation.meters import AcceptedLabels, Accuracy, Calibration, Confusion, NonFinite
from engine.evaluation.views import AmongClasses, SubModelView
from engine.precision import Precision

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
CLASSES, IMAGES = 12, 103


@pytest.fixture
def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that is right half of the time, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    logits = 2 * torch.randn(IMAGES, CLASSES, generator=generator) + 3 * nn.functional.one_hot(labels, CLASSES)
    return logits, labels


def fed(meter, logits, labels, batch: int = 10):
    """The meter after all images in batches, with an image between them that does not count."""
    for images, answers in zip(logits.split(batch), labels.split(batch), strict=True):
        meter.update(torch.cat([images, 50 * torch.eye(CLASSES)[:1]]), torch.cat([answers, torch.tensor([IGNORED])]))
    return meter


def test_accuracy_and_cross_entropy_are_those_of_scikit_learn(outputs):
    logits, labels = outputs
    found = fed(Accuracy(CPU), logits, labels).result()
    every = range(CLASSES)
    assert found["images"] == IMAGES
    assert found["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1, labels=every))
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=every))
    assert found["eval_loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=every), rel=1e-5)


def test_the_confusion_matrix_is_that_of_scikit_learn(outputs):
    logits, labels = outputs
    confusion = fed(Confusion(CLASSES, CPU), logits, labels)
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(CLASSES))
    np.testing.assert_array_equal(confusion.totals, expected)
    pairs = confusion.most_confused(200)
    assert sum(images for *_, images in pairs) == IMAGES - np.trace(expected)
    assert all(expected[true, predicted] == images and true != predicted for true, predicted, images in pairs)
    assert [images for *_, images in pairs] == sorted((images for *_, images in pairs), reverse=True)


def test_the_calibration_error_is_that_of_its_definition(outputs):
    logits, labels = outputs
    calibration = fed(Calibration(CPU), logits, labels)
    confidence, predicted = (values.numpy() for values in logits.softmax(1).max(1))
    correct, error = predicted == labels.numpy(), 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration.error == pytest.approx(100 * error, rel=1e-5)


def test_certain_predictions_are_calibrated_if_they_are_right():
    logits = 100 * torch.eye(3)
    calibration = Calibration(CPU)
    calibration.update(logits, torch.arange(3))
    assert calibration.error == pytest.approx(0, abs=1e-9)
    calibration.update(logits, torch.arange(3).roll(1))  # now half of them are wrong
    assert calibration.error == pytest.approx(50)


def test_with_several_right_labels_any_of_them_counts():
    accepted = torch.tensor([[1, 2], [3, IGNORED], [0, 7]])
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % 4 - 1  # every fourth is IGNORED
    accuracy, confusion = Accuracy(CPU), Confusion(8, CPU)
    AcceptedLabels(accepted, [accuracy, confusion]).update(logits, labels)
    ranked = logits.argsort(dim=1, descending=True)
    right = [(row.tolist(), set(accepted[label].tolist())) for row, label in zip(ranked, labels, strict=True)
             if label != IGNORED]  # fmt: skip
    found = accuracy.result()
    assert found["images"] == len(right) == confusion.totals.sum() == 30
    assert found["top1"] == pytest.approx(100 * sum(row[0] in labels for row, labels in right) / 30)
    assert found["top5"] == pytest.approx(100 * sum(bool({*row[:5]} & labels) for row, labels in right) / 30)
    assert confusion.totals.diag().sum() == sum(row[0] in labels for row, labels in right)


def test_a_model_chooses_among_the_candidates_alone():
    torch.manual_seed(0)
    model, images = nn.Linear(5, 9), torch.randn(6, 5)
    assert torch.equal(AmongClasses(model, [7, 2, 4])(images), model(images)[:, [7, 2, 4]])


def test_meters_see_what_evaluate_sees_and_the_mode_is_restored(outputs):
    logits, labels = outputs
    model = nn.Sequential(nn.Dropout(0.5)).train()
    batches = list(zip(logits.split(20), labels.split(20), strict=True))
    accuracy = Accuracy(CPU)
    measure(model, batches, Precision("off", CPU), ALONE, [accuracy, Confusion(CLASSES, CPU)])
    assert accuracy.result() == evaluate(model, batches, Precision("off", CPU), ALONE)
    assert model.training


def test_without_images_there_is_no_accuracy():
    with pytest.raises(InputError, match="none of the held-out images can be read"):
        fed(Accuracy(CPU), torch.zeros(1, CLASSES), torch.tensor([IGNORED])).result()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_have_no_accuracy(outputs, value):
    """argmax takes NaN for class 0: such a model would be right of all its images."""
    logits, labels = outputs
    spoilt = logits.clone()
    spoilt[::10, 3] = value  # of one class, in every batch

    def figures(logits, labels):
        batches = list(zip(logits.split(20), labels.split(20), strict=True))
        return evaluate(nn.Identity(), batches, Precision("off", CPU), ALONE, "the averaged weights")

    message = r"^evaluation: logits of the averaged weights are NaN or infinite for 11 of 103 images$"
    with pytest.raises(RunError, match=message):
        figures(spoilt, labels)
    others = labels.clone()
    others[::10] = IGNORED  # what is no image is blank, and may give anything
    assert figures(spoilt, others) == figures(logits, others)


def test_counting_what_is_not_finite_reads_nothing_back(outputs):
    """A waiting for the device in each batch would show on a GPU."""
    logits, labels = (tensor.to("meta") for tensor in outputs)
    NonFinite(torch.device("meta")).update(logits, labels)  # reading a value of it would raise


def batches_of(images, labels):
    return list(zip(images.split(3), labels.split(3), strict=True))


@pytest.mark.parametrize("name", ["masking", "drop_path"])
def test_a_sub_model_is_evaluated_with_the_same_draws_each_time(patched_model, name):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batches, precision = batches_of(images, torch.arange(8)), Precision("off", CPU)
    options = {"cell": 8} if name == "masking" and augsub.supports(patched_model)["masking"] != "tokens" else {}

    def result(seed: int, ratio: float) -> dict[str, float]:
        augmentation = augsub.build({"name": name, "ratio": ratio, **options})
        return evaluate(SubModelView(patched_model, augmentation, seed, ALONE), batches, precision, ALONE)

    main = evaluate(patched_model, batches, precision, ALONE)
    assert result(0, 0.0) == main
    assert result(0, 0.5) == result(0, 0.5)
    assert len({result(seed, 0.5)["eval_loss"] for seed in (0, 1)} | {main["eval_loss"]}) == 3
