"""Metrics against independent computations, whatever the batches, and what is written of them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

import augsub
from engine.data.imagenet_family import CORRUPTIONS
from engine.data.images import IGNORED
from engine.data.source import DataSource
from engine.distributed import Process
from engine.errors import RunError
from engine.evaluation.metrics import Metrics, Result, evaluate
from engine.evaluation.pictures import draw_confusion
from engine.evaluation.report import tables, write
from engine.figure import save
from engine.precision import Precision

CPU = torch.device("cpu")
ALONE, FULL = Process(0, 1, CPU), Precision("off", CPU)
CLASSES, IMAGES = 12, 103


def counting(num_classes: int, **labels) -> Metrics:
    return Metrics(CPU, DataSource(None, None, num_classes, 3, **labels))


@pytest.fixture
def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that is right half of the time, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    logits = 2 * torch.randn(IMAGES, CLASSES, generator=generator) + 3 * nn.functional.one_hot(labels, CLASSES)
    return logits, labels


def batches_of(images, labels, size: int = 20):
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_figures_are_those_of_scikit_learn(outputs):
    logits, labels = outputs
    metrics = counting(CLASSES)
    for images, answers in batches_of(logits, labels, 10):  # with an image in each batch that does not count
        metrics.update(torch.cat([images, 50 * torch.eye(CLASSES)[:1]]), torch.cat([answers, torch.tensor([IGNORED])]))
    found, every = metrics.figures(), range(CLASSES)
    assert found["images"] == IMAGES
    assert found["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=1, labels=every))
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=every))
    assert found["eval_loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=every), rel=1e-5)

    balanced = pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1)))
    assert found["balanced_accuracy"] == balanced
    known = Metrics(CPU, num_classes=CLASSES + 1)  # one of which there are no images
    known.update(logits, labels)
    assert known.figures()["balanced_accuracy"] == balanced

    expected = confusion_matrix(labels, logits.argmax(1), labels=every)
    np.testing.assert_array_equal(metrics.confusion, expected)
    pairs = metrics.most_confused(200)
    assert sum(images for *_, images in pairs) == IMAGES - np.trace(expected)
    assert all(expected[true, predicted] == images and true != predicted for true, predicted, images in pairs)
    assert [images for *_, images in pairs] == sorted((images for *_, images in pairs), reverse=True)

    confidence, predicted = (values.numpy() for values in logits.softmax(1).max(1))
    correct, error = predicted == labels.numpy(), 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert found["ece"] == pytest.approx(100 * error, rel=1e-5)


def test_with_several_right_labels_any_of_them_counts():
    accepted = torch.tensor([[1, 2], [3, IGNORED], [0, 7]])
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % 4 - 1  # every fourth is IGNORED
    metrics = counting(8, accepted=accepted)
    metrics.update(logits, labels)
    ranked = logits.argsort(dim=1, descending=True)
    right = [(row.tolist(), set(accepted[label].tolist())) for row, label in zip(ranked, labels, strict=True)
             if label != IGNORED]  # fmt: skip
    found = metrics.figures()
    assert found["images"] == len(right) == metrics.confusion.sum() == 30
    assert found["top1"] == pytest.approx(100 * sum(row[0] in labels for row, labels in right) / 30)
    assert found["top5"] == pytest.approx(100 * sum(bool({*row[:5]} & labels) for row, labels in right) / 30)
    assert metrics.confusion.diag().sum() == sum(row[0] in labels for row, labels in right)


def test_counting_in_detail_changes_no_figure_and_the_mode_is_restored(outputs):
    model = nn.Sequential(nn.Dropout(0.5)).train()
    figures = evaluate(model, batches_of(*outputs), FULL, ALONE, metrics=counting(CLASSES))
    plain = evaluate(model, batches_of(*outputs), FULL, ALONE)
    assert figures.keys() - plain.keys() == {"ece", "balanced_accuracy"}
    assert plain.items() <= figures.items()
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_have_no_accuracy(outputs, value):
    """argmax takes NaN for class 0: such a model would be right of all its images."""
    logits, labels = outputs
    spoilt, others = logits.clone(), labels.clone()
    spoilt[::10, 3] = value  # of one class, in every batch
    message = r"^evaluation: logits of the averaged weights are NaN or infinite for 11 of 103 images$"
    with pytest.raises(RunError, match=message):
        evaluate(nn.Identity(), batches_of(spoilt, labels), FULL, ALONE, "the averaged weights")
    others[::10] = IGNORED  # what is no image is blank, and may give anything
    assert evaluate(nn.Identity(), batches_of(spoilt, others), FULL, ALONE) == evaluate(
        nn.Identity(), batches_of(logits, others), FULL, ALONE
    )


def test_counting_reads_nothing_back(outputs):
    """A waiting for the device in each batch would show on a GPU."""
    logits, labels = (tensor.to("meta") for tensor in outputs)
    Metrics(torch.device("meta")).update(logits, labels)  # reading a value of it would raise


@pytest.mark.parametrize("name", ["masking", "drop_path"])
def test_a_sub_model_is_evaluated_with_the_same_draws_each_time(patched_model, name):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batches = batches_of(images, torch.arange(8), 3)
    options = {"cell": 8} if name == "masking" and augsub.supports(patched_model)["masking"] != "tokens" else {}

    def result(seed: int, ratio: float, batches=batches) -> dict[str, float]:
        augmentation = augsub.build({"name": name, "ratio": ratio, **options})
        return evaluate(patched_model, batches, FULL, ALONE, augmentation=augmentation, seed=seed)

    main = evaluate(patched_model, batches, FULL, ALONE)
    assert result(0, 0.0) == main
    assert result(0, 0.5) == result(0, 0.5)
    assert len({result(seed, 0.5)["eval_loss"] for seed in (0, 1)} | {main["eval_loss"]}) == 3
    one, twice = (result(0, 0.5, count * batches[:1])["eval_loss"] for count in (1, 2))
    assert one != pytest.approx(twice, rel=1e-6)  # each batch has draws of its own


SEVERITIES = [f"{corruption}/{severity}" for corruption in ("snow", "fog") for severity in range(1, 6)]
CANDIDATES = [8, 1, 5, 3]  # the model has ten classes, labels are places in this list


def test_a_benchmark_of_several_sets_is_measured_apart_and_together(tmp_path):
    generator, sources = torch.Generator().manual_seed(0), {}
    for size, name in enumerate(SEVERITIES, start=11):
        sources[name] = torch.randn(size, 6, generator=generator), torch.arange(size) % len(CANDIDATES)
    torch.manual_seed(0)
    model = nn.Linear(6, 10)
    whole, parts = counting(10, class_names="abcd", candidates=CANDIDATES), {}
    for name, tensors in sources.items():
        part = counting(10, class_names="abcd", candidates=CANDIDATES)
        parts[name] = evaluate(model, batches_of(*tensors, 4), FULL, ALONE, metrics=part)
        whole.add(part)
    result = Result("", whole, parts)
    hits = {}
    for name, (images, labels) in sources.items():
        hits[name] = model(images)[:, CANDIDATES].argmax(dim=1) == labels
        assert result.parts[name]["top1"] == pytest.approx(100 * hits[name].double().mean().item())
        assert result.parts[name]["images"] == len(labels)
    errors = [100 - 100 * right.double().mean().item() for right in hits.values()]
    assert result.mean_corruption_error == pytest.approx(sum(errors) / 10)
    assert result.metrics.figures()["top1"] == pytest.approx(100 * torch.cat([*hits.values()]).double().mean().item())

    evaluated = {
        "model": "linear", "source": "nowhere", "data": "ImageNet (c)", "image_size": 8, "crop": 1.0,
        "interpolation": "bicubic", "parameters": 70, "class_names": ["a", "b", "c", "d"],
    }  # fmt: skip
    snow, fog, mean = (line.split()[1:] for line in tables(evaluated, [result]).splitlines()[-3:])
    assert snow == ["snow", *(f"{error:.2f}" for error in errors[:5]), f"{sum(errors[:5]) / 5:.2f}"]
    assert fog[-1] == f"{sum(errors[5:]) / 5:.2f}" and mean == ["mean", f"{sum(errors) / 10:.2f}"]
    write(tmp_path, evaluated, [result])
    with (tmp_path / "corruptions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"{row['corruption']}/{row['severity']}" for row in rows] == SEVERITIES
    assert [float(row["top1_err"]) for row in rows] == pytest.approx(errors, abs=1e-3)
    (found,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert found["mean_corruption_error"] == pytest.approx(sum(errors) / 10)
    confused = sum(pair["images"] for pair in found["most_confused"])  # four classes have few pairs: all are listed
    assert confused == sum(int((~right).sum()) for right in hits.values())


def test_intervals_are_those_of_a_bootstrap_over_the_images(outputs):
    logits, labels = outputs
    metrics = counting(CLASSES)
    for images, answers in batches_of(logits, labels):
        metrics.update(images, answers)
    metrics.reduce(ALONE)
    np.testing.assert_array_equal(metrics.outcomes, [labels, logits.argmax(1)])
    right = (logits.argmax(1) == labels).numpy().astype(float)
    of_five = np.array([label in row for label, row in zip(labels, logits.topk(5).indices, strict=True)], dtype=float)
    found = metrics.intervals()
    for name, hits in (("top1", right), ("top5", of_five)):
        expected = stats.bootstrap((hits,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
        assert found[name] == pytest.approx((100 * expected.low, 100 * expected.high), abs=1.01 * 100 / IMAGES)
    rng, means = np.random.default_rng(1), []
    for _ in range(2000):
        of_class = [right[labels.numpy() == label] for label in range(CLASSES)]
        means.append(np.mean([rng.choice(hits, len(hits)).mean() for hits in of_class]))
    assert found["balanced_accuracy"] == pytest.approx(100 * np.quantile(means, [0.025, 0.975]), abs=1)


def test_corruption_errors_relative_to_alexnets_are_as_published():
    """Of torchvision's ResNet-50: top-1 and the corruption error, both in percent, as others have computed them."""
    published = {
        "brightness": (68.02, 56.64), "contrast": (39.06, 71.43), "defocus_blur": (38.75, 74.71),
        "elastic_transform": (45.25, 84.75), "fog": (45.83, 66.11), "frost": (38.14, 74.84),
        "gaussian_noise": (29.29, 79.77), "glass_blur": (26.79, 88.61), "impulse_noise": (23.81, 82.58),
    }  # fmt: skip
    for name, (top1, relative) in published.items():
        parts = {f"{name}/{severity}": {"top1": top1 + severity - 3} for severity in range(1, 6)}
        assert Result("", None, parts, reference=CORRUPTIONS).mce == pytest.approx(relative, abs=0.01)
    parts = {f"{name}/1": {"top1": top1} for name, (top1, _) in published.items()}
    mean = sum(relative for _, relative in published.values()) / len(published)
    assert Result("", None, parts, reference=CORRUPTIONS).mce == pytest.approx(mean, abs=0.01)
    assert Result("", None, parts).mce is None


@pytest.mark.parametrize("num_classes", [2, 40])
def test_there_is_a_picture_of_few_classes_and_of_many_right_or_wrong(num_classes, tmp_path):
    for number, shift in enumerate((0, 1)):  # all right, then all wrong
        metrics = counting(num_classes)
        metrics.update(torch.eye(num_classes), torch.arange(num_classes).roll(shift))
        names = ["a class with a long name, which others have too"] * num_classes
        save(draw_confusion(metrics, names, "$x"), tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").stat().st_size != (tmp_path / "1.png").stat().st_size
