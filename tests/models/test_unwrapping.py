"""Where in a checkpoint the weights of a model are found, and what is said of those that are left."""

from __future__ import annotations

import logging

import pytest
import torch

from models.build import create_model
from models.weights import load_weights

Weights = dict[str, torch.Tensor]


def tiny_vit() -> torch.nn.Module:
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 2}
    return create_model("vit_tiny_patch16_224", num_classes=10, image_size=32, **shape)


def weights_of(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in tiny_vit().state_dict().items()}


OWN, OTHER = weights_of(0), weights_of(1)


def behind(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


HEAD = {f"projector.{layer}.weight": torch.ones(3, 3) for layer in range(12)}
CONTENTS = {
    "a teacher beside": behind("model.", OWN) | behind("teacher.", OTHER),
    "an average beside, first": behind("model_ema.module.", OTHER) | behind("net.", OWN),
    "a large head beside": behind("backbone.", OWN) | HEAD,
    "many metrics in a container": {"state_dict": behind("model.", OWN) | HEAD, "epoch": 3},
    "an encoder and its average": {"state_dict": behind("base.", OWN) | behind("momentum_encoder.", OTHER)},
    "student and teacher": {"teacher": behind("backbone.", OTHER), "student": behind("module.backbone.", OWN) | HEAD},
    "plain values beside": behind("module.", OWN) | {"epoch": 3, "arch": "vit"},
    "a container of any name": {"my_network": {"weights": OWN}, "optimizer": {"state": {0: {"step": torch.ones(3)}}}},
    "both of timm": {"state_dict": OWN, "state_dict_ema": OTHER},
    "averaged by torch": behind("module.", OWN) | {"n_averaged": torch.tensor(3)},
    "a block with checkpointing": {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): weight for name, weight in OWN.items()
    },
    "a block of its own unit": behind("_fsdp_wrapped_module._orig_mod.", OWN),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_the_trained_weights_are_found(case):
    model = tiny_vit()
    report = load_weights(model, CONTENTS[case], "file")
    assert all(torch.equal(weight, OWN[name]) for name, weight in model.state_dict().items())
    assert report.initial == () and set(report.loaded) == OWN.keys()


def test_what_is_left_is_named(caplog):
    caplog.set_level(logging.INFO, "models")
    report = load_weights(tiny_vit(), CONTENTS["a teacher beside"] | {"criterion.weight": torch.ones(2)}, "file")
    assert set(report.unexpected) == {"criterion.weight", *(f"teacher.{name}" for name in OTHER)}
    assert "file: these are 'model', not 'teacher'" in caplog.text
    caplog.clear()
    load_weights(tiny_vit(), CONTENTS["both of timm"], "file")
    assert "file: these are 'state_dict', not 'state_dict_ema'" in caplog.text
    caplog.clear()
    load_weights(tiny_vit(), {"teacher": behind("backbone.", OTHER)}, "file")
    assert "file: holds no trained weights, only their average, 'teacher.backbone'" in caplog.text


@pytest.mark.parametrize("prefix", ["", "model.", "module.encoder."])
def test_another_depth_is_another_model_behind_any_wrapper(prefix):
    deeper = OWN | {name.replace("blocks.1.", "blocks.2."): weight for name, weight in OWN.items()}
    with pytest.raises(ValueError, match=r"of another model: it fills 32 of 32 tensors and has 1[23] unknown"):
        load_weights(tiny_vit(), {"state_dict": behind(prefix, deeper) | {"criterion.weight": torch.ones(2)}}, "file")
