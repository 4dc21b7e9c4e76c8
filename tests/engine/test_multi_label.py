"""Images with several labels: figures against scikit-learn, mixing against the formula, each image counted once."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, log_loss
from timm.data import Mixup
from torch import nn

from engine.config import Config
from engine.data.images import IGNORED
from engine.data.source import DataSource
from engine.distributed import Process
from engine.errors import InputError
from engine.evaluation.metrics import Result, evaluate
from engine.evaluation.multi_label import MultiLabelMetrics, best_threshold
from engine.evaluation.report import tables, write
from engine.loss import build_mixup, class_weights
from engine.precision import Precision

CPU = torch.device("cpu")
IMAGES, CLASSES = 90, 5


@pytest.fixture
def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model that knows something, and targets; the last class has no image."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(IMAGES, CLASSES, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.4, 0.0])).float()
    return torch.randn(IMAGES, CLASSES, generator=generator) + 2 * targets - 1, targets


def test_figures_are_those_of_scikit_learn(outputs):
    logits, targets = outputs
    filling = torch.full((1, CLASSES), float(IGNORED))
    batches = [
        (torch.cat([part, torch.zeros(1, CLASSES)]), torch.cat([own, filling]))
        for part, own in zip(logits.split(20), targets.split(20), strict=True)
    ]
    found = evaluate(nn.Identity(), batches, Precision("off", CPU), Process(0, 1, CPU), metrics=MultiLabelMetrics(CPU))
    scores, answers = logits.double().sigmoid().numpy(), targets.numpy().astype(int)
    assert found["images"] == IMAGES
    assert found["map"] == pytest.approx(100 * average_precision_score(answers[:, :4], scores[:, :4]), abs=1e-6)
    assert found["f1_macro"] == pytest.approx(
        100 * f1_score(answers[:, :4], scores[:, :4] > 0.5, average="macro"), abs=1e-6
    )
    assert found["f1_micro"] == pytest.approx(100 * f1_score(answers, scores > 0.5, average="micro"), abs=1e-6)
    of_classes = [log_loss(own, of_one, labels=[0, 1]) for own, of_one in zip(answers.T, scores.T, strict=True)]
    assert found["eval_loss"] == pytest.approx(np.mean(of_classes), rel=1e-5)


def test_where_one_class_alone_occurs_its_f1_is_the_mean():
    metrics = MultiLabelMetrics(CPU)
    targets = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    metrics.update(torch.tensor([[-1.0, 2.0, -1.0], [-1.0, 3.0, -1.0], [-1.0, -2.0, -1.0]]), targets)
    assert metrics.figures()["f1_macro"] == pytest.approx(50) == metrics.of_classes("abc")[1]["f1"]


def test_the_best_threshold_is_that_of_a_search(outputs):
    logits, targets = outputs
    own, scores = targets[:, 1].numpy() > 0, logits[:, 1].sigmoid().numpy()
    threshold, best = best_threshold(own, scores)
    searched = max(f1_score(own, scores >= candidate) for candidate in scores)
    assert best == pytest.approx(searched) == pytest.approx(f1_score(own, scores >= threshold))


def test_images_without_any_label_have_no_figure():
    metrics = MultiLabelMetrics(CPU)
    metrics.update(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match="none of the held-out images has a label"):
        metrics.figures()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("integer_pixels", [False, True])
def test_targets_are_mixed_as_images_are(mode, integer_pixels):
    config = Config()
    vars(config.mixup).update(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, integer_pixels=integer_pixels)
    source = DataSource(None, None, CLASSES, 3, has_several_labels=True)
    mix = build_mixup(config, source, 8, CPU)
    labels = torch.arange(8) % CLASSES
    generator = torch.Generator().manual_seed(1)
    several = (torch.rand(8, CLASSES, generator=generator) < 0.5).float()
    images = torch.rand(8, 3, 16, 16, generator=generator)
    for seed in range(6):
        shares = []
        for targets in (nn.functional.one_hot(labels, CLASSES).float(), several):
            np.random.seed(seed)
            shares.append(mix(images.clone(), targets))
        np.random.seed(seed)
        timms = Mixup(0.8, 1.0, mode=mode, label_smoothing=0, num_classes=CLASSES)(images.clone(), labels)
        torch.testing.assert_close(shares[0][1], timms[1])  # one-hot targets are those of timm
        np.random.seed(seed)
        whole = Mixup(0.8, 1.0, mode=mode, label_smoothing=0, num_classes=8)(images.clone(), torch.arange(8))[1]
        torch.testing.assert_close(shares[1][1], whole @ several)
    mix.mixup_enabled = False
    torch.testing.assert_close(mix(images.clone(), several)[1], several)


def test_balanced_weights_follow_from_the_positives():
    class Data:
        labels = np.array([[1, 0], [1, 1], [1, 0], [0, 0]])

        def __len__(self):
            return 4

    config = Config()
    config.loss.class_weights = "balanced"
    assert class_weights(config.loss, DataSource(Data(), None, 2, 3)).tolist() == pytest.approx([4 / 6, 2.0])


def test_the_report_has_classes_thresholds_and_a_picture(outputs, tmp_path):
    metrics = MultiLabelMetrics(CPU)
    metrics.update(*outputs)
    metrics.reduce(Process(0, 1, CPU))
    names = ["red", "round", "rare", "big", "none"]
    evaluated = {"model": "vit", "source": "x", "data": "y", "image_size": 32, "crop": 1.0, "interpolation": "bicubic",
                 "parameters": 1, "class_names": names}  # fmt: skip
    results = [Result("", metrics, {"": metrics.figures()})]
    assert "map" in tables(evaluated, results) and "top1" not in tables(evaluated, results)
    write(tmp_path, evaluated, results)
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    scores, answers = outputs[0].sigmoid().numpy(), outputs[1].numpy()
    assert float(rows[1]["ap"]) == pytest.approx(100 * average_precision_score(answers[:, 1], scores[:, 1]), abs=1e-3)
    assert rows[4]["ap"] == "" and rows[4]["images"] == "0"
    saved = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert saved["thresholds"]["red"] == best_threshold(answers[:, 0] > 0, scores[:, 0])[0]
    assert (tmp_path / "precision_recall.png").exists() and not (tmp_path / "confusion.png").exists()
