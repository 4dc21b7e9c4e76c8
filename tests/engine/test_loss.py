"""The main model's loss and the mixing that makes its targets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import TensorDataset

from engine.checkpoint_file import EXPORTED
from engine.config import Config, LossConfig, MixupConfig
from engine.data.source import DataSource
from engine.errors import InputError
from engine.hooks.training import StopMixing
from engine.loss import build_criterion, build_mixup, build_teacher, class_weights
from engine.text import to_json
from models.build import create_model

CLASSES = DataSource(None, None, num_classes=5, in_chans=3)

CPU = torch.device("cpu")


def config(smoothing: float = 0.1, **mixup) -> Config:
    return Config(mixup=MixupConfig(**mixup), loss=LossConfig(smoothing=smoothing))


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (7, None, r"checkpoint .*t\.pt.*7"),
        (
            5,
            ["4", "3", "2", "1", "0"],
            r"augsub\.teacher\.checkpoint = .*t\.pt is for other classes than the data have",
        ),
        (5, ["0", "1", "2", "3", "4"], None),
        (5, None, None),
    ],
)
def test_a_teacher_knows_the_classes_of_the_data(tmp_path, classes, names, message):
    weights = create_model("test_vit", num_classes=classes, image_size=32).state_dict()
    torch.save({"model": weights, "class_names": names}, tmp_path / "t.pt")
    own = config()
    own.data.image_size = 32
    own.augsub.teacher.name, own.augsub.teacher.checkpoint = "test_vit", str(tmp_path / "t.pt")
    if message is None:
        assert torch.equal(build_teacher(own, CLASSES).head.weight, weights["head.weight"])
    else:
        with pytest.raises(InputError, match=message):
            build_teacher(own, CLASSES)


def test_an_exported_teacher_tells_its_classes_too(tmp_path):
    model, own = create_model("test_vit", num_classes=5, image_size=32), config()
    said = to_json({"class_names": ["4", "3", "2", "1", "0"]})
    (tmp_path / "t.safetensors").write_bytes(save(model.state_dict(), metadata={EXPORTED: said}))
    own.data.image_size = 32
    own.augsub.teacher.name, own.augsub.teacher.checkpoint = "test_vit", str(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="is for other classes than the data have"):
        build_teacher(own, CLASSES)


def test_smoothed_cross_entropy_without_mixup():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    smoothed = build_criterion(LossConfig(smoothing=0.2), soft_labels=False)(logits, labels)
    torch.testing.assert_close(smoothed, nn.functional.cross_entropy(logits, labels, label_smoothing=0.2))
    plain = build_criterion(LossConfig(), soft_labels=False)(logits, labels)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, labels))


def test_mixup_gives_soft_labels_that_its_loss_takes():
    mixup = build_mixup(config(mixup_alpha=0.8, cutmix_alpha=1.0), source=CLASSES, micro_batch=4, device=CPU)
    _images, targets = mixup(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    logits = torch.randn(4, 5)
    losses = {
        name: build_criterion(LossConfig(name=name, smoothing=0.1), soft_labels=True)(logits, targets)
        for name in ("cross_entropy", "bce")
    }
    torch.testing.assert_close(losses["cross_entropy"], nn.functional.cross_entropy(logits, targets))
    torch.testing.assert_close(losses["bce"], nn.functional.binary_cross_entropy_with_logits(logits, targets))


def test_weights_of_classes_count_alike_however_many_images_are_at_once():
    weights, logits = torch.tensor([1.0, 9.0, 0.5]), torch.randn(8, 3)
    labels = torch.tensor([0, 0, 1, 0, 0, 2, 0, 0])
    for soft in (False, True):
        criterion = build_criterion(LossConfig(smoothing=0.1), soft, weights)
        targets = nn.functional.one_hot(labels, 3).float() if soft else labels
        whole = criterion(logits, targets)
        parts = [criterion(*part) for part in zip(logits.split(2), targets.split(2), strict=True)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
    expected = (weights[labels] * nn.functional.cross_entropy(logits, labels, reduction="none")).mean()
    torch.testing.assert_close(build_criterion(LossConfig(), False, weights)(logits, labels), expected)


def source(*counts: int) -> DataSource:
    """So many images of each of the classes cat, dog, fox, in the order of the classes."""
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    train = TensorDataset(torch.zeros(len(labels), 1), labels)
    return DataSource(train, train, num_classes=3, in_chans=1, class_names=("cat", "dog", "fox"))


def test_balanced_weights_are_those_of_scikit_learn_and_rare_classes_count_more():
    data = source(2, 10, 4)
    weights = class_weights(LossConfig(class_weights="balanced"), data)
    labels = data.train_labels
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    logits, labels = torch.randn(16, 3), torch.from_numpy(labels)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    by_image = weights[labels]
    weighted = build_criterion(LossConfig(), soft_labels=False, weights=weights)(logits, labels)
    torch.testing.assert_close(weighted, (by_image * losses).sum() / by_image.sum())
    one_hot = nn.functional.one_hot(labels, 3).float()
    bce = nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    weighted = build_criterion(LossConfig(name="bce"), soft_labels=False, weights=weights)(logits, labels)
    torch.testing.assert_close(weighted, (bce * weights).mean())
    mixed = build_criterion(LossConfig(smoothing=0.1), soft_labels=True, weights=weights)(logits, one_hot)
    torch.testing.assert_close(mixed, (by_image * losses).mean())  # smoothing is in the labels


def test_weights_by_name_and_what_is_wrong_with_them():
    weights = class_weights(LossConfig(class_weights={"fox": 2.5, "cat": 0.5}), source(1, 1, 1))
    assert weights.tolist() == [0.5, 1.0, 2.5] and class_weights(LossConfig(), source(1, 1, 1)) is None
    for given, message in {
        "balance": "loss.class_weights = balance: allowed is balanced, or a mapping of classes to weights",
        "balanced": "loss.class_weights = balanced: class dog has no training image",
    }.items():
        with pytest.raises(InputError, match=message):
            class_weights(LossConfig(class_weights=given), source(3, 0, 1))
    for given, message in {
        ("foxx", 2): "foxx is none of the classes, did you mean 'fox'",
        ("fox", 0): "fox = 0: allowed is a number above 0",
        ("fox", "much"): "fox = much: allowed is",
    }.items():
        with pytest.raises(InputError, match=message):
            class_weights(LossConfig(class_weights=dict([given])), source(1, 1, 1))


def test_mixup_is_off_without_alphas_and_needs_pairs():
    assert build_mixup(config(), source=CLASSES, micro_batch=3, device=CPU) is None
    boxes = build_mixup(config(cutmix_minmax=[0.2, 0.8]), source=CLASSES, micro_batch=4, device=CPU)
    assert boxes.cutmix_minmax == [0.2, 0.8]
    with pytest.raises(InputError, match="even number of images"):
        build_mixup(config(mixup_alpha=0.8), source=CLASSES, micro_batch=3, device=CPU)


def test_integer_pixels_are_those_of_mixing_before_normalisation():
    settings = config(smoothing=0.0, mixup_alpha=0.8, integer_pixels=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.transform.mean, settings.transform.std))
    pixels = torch.randint(0, 256, (4, 3, 8, 8)).float()
    np.random.seed(3)
    mixed, targets = build_mixup(settings, CLASSES, 4, CPU)((pixels / 255 - mean) / std, torch.tensor([0, 1, 2, 3]))
    weight = targets[0, 0]
    assert 0 < weight < 1
    expected = (weight * pixels + (1 - weight) * pixels.flip(0)).round()
    torch.testing.assert_close((mixed * std + mean) * 255, expected, rtol=0, atol=1e-3)


def test_mixing_stops_at_an_epoch_and_labels_stay_smoothed():
    mixup = build_mixup(config(mixup_alpha=0.8), source=CLASSES, micro_batch=4, device=CPU)
    hook = StopMixing(mixup, epoch=2)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for epoch, mixes in ((0.0, True), (1.9, True), (2.0, False), (5.5, False)):
        hook.trainer = SimpleNamespace(epoch=epoch)
        hook.before_step()
        mixed, targets = mixup(images.clone(), labels)
        assert torch.equal(mixed, images) != mixes
        assert targets[0, 4] == pytest.approx(0.1 / 5)
