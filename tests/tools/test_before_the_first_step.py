"""Settings that would train another model, ruin it or crash in the middle: told before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.checkpoint import load
from engine.config import Config, EmaConfig
from engine.defaults import log_warnings
from tools import train_net

RUN = ("train.max_iters=2", "data.workers=0")


@pytest.fixture
def train(call, tmp_path):
    """Train with overrides; returns (exit code, output, error and log, last checkpoint)."""

    def run(*overrides: str, config: str = "digits_vit") -> tuple:
        folder = tmp_path / "run"
        return *call(
            train_net, "--config", config, f"output_dir={folder}", *RUN, *overrides
        ), folder / "checkpoints" / "last.pt"

    return run


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.kwargs={patch_size:4,depth:4}", "model.kwargs.patch_size:4 = null: a space is missing after the colon"),
        (
            "optimizer.kwargs={nesterov:true}",
            "optimizer.kwargs.nesterov:true = null: a space is missing after the colon",
        ),
        ("augsub.sub_models=[{augmentations: [{name: masking, ratio:0.5}]}]", "ratio:0.5 = null: a space is missing"),
        ("model.kwargs={depth: null}", "model.kwargs.depth = null: must have a value, or go"),
        ("model.kwargs={dept: 3}", "unexpected keyword argument 'dept', did you mean 'depth'?"),
        ("model.frozen=[pos_embed,cls_token,patch_embed,blocks,norm,head]", "model: frozen: nothing is left to learn"),
        ("model.kwargs={features_only: true, patch_size: 2}", "the model is no classifier: its output is list"),
        ("optimizer.name=adahessian", "optimizer.name = adahessian: needs the gradient's own graph"),
    ],
)
def test_one_line_says_what_is_wrong(train, override, line):
    code, _, error, last = train(override)
    assert code == 2 and error.count("\n") == 1 and line in error
    assert not last.parent.exists()


def test_one_value_in_each_channel_of_batchnorm_is_foreseen(train):
    """A network of stride 32 leaves one position of 32 pixels: two images at once are needed."""
    code, _, error, last = train("train.global_batch=4", "train.accumulation=4", config="digits_resnet")
    assert code == 2 and "train.global_batch = 4, one image at once: raise train.global_batch, or lower" in error
    assert "more than 1 value per channel" in error and not last.parent.exists()
    assert train("train.global_batch=4", "train.accumulation=2", config="digits_resnet")[0] == 0


def test_one_value_is_enough_for_layers_that_are_frozen(train):
    frozen = "model.frozen=[conv1,bn1,layer1,layer2,layer3,layer4]"
    assert train("train.global_batch=1", frozen, config="digits_resnet")[0] == 0


@pytest.mark.parametrize("augmentation", ["masking", "random_crop"])
def test_statistics_of_frozen_layers_stay(train, augmentation):
    """Over steps, sub-models and an evaluation, which puts the whole model back into training mode."""
    sub_model = f"augsub.sub_models=[{{augmentations: [{{name: {augmentation}, ratio: 0.5}}]}}]"
    size = "data.image_size=64"
    settings = (sub_model, size, "train.global_batch=300", "train.max_iters=5")  # an epoch has three steps
    code, _, _, last = train(*settings, "model.frozen=[layer1,bn1]", config="digits_resnet")
    assert code == 0
    for name, value in load(last)["model"].items():
        if "running_" in name:
            initial = torch.full_like(value, float(name.endswith("var")))
            assert torch.equal(value, initial) == name.startswith(("layer1.", "bn1.")), name


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        (("ema.enabled=true",), True),
        (("ema.enabled=true", "ema.warmup=true"), False),
        (("ema.enabled=true", "ema.decay=0.3"), False),
        ((), False),
    ],
)
def test_an_average_that_a_short_run_does_not_fill_is_told(train, settings, warns, caplog):
    code, *_ = train(*settings)
    line = "WARNING: ema.decay = 0.9999: after 2 steps the average still consists of the initial weights to 100.0 %"
    assert code == 0 and any(line in message for message in caplog.messages) == warns


@pytest.mark.parametrize(("steps", "advice"), [(36, 0.7), (1200, 0.992), (10_000, 0.999), (300_000, 0.99997)])
def test_the_decay_that_is_advised_suits_the_run(steps, advice, caplog):
    config = Config(ema=EmaConfig(enabled=True, decay=0.999999))
    log_warnings(config, SimpleNamespace(max_iterations=steps))
    assert caplog.messages[-1].endswith(f"or set ema.decay={advice}")
    config.ema.decay = advice
    caplog.clear()
    log_warnings(config, SimpleNamespace(max_iterations=steps))
    assert not caplog.messages and advice**steps < 1e-3
