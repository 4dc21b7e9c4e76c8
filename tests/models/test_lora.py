"""Adapters: nothing at first, alone in learning, and merged where a plain model is wanted."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import LoraConfig, inject_adapter_in_model

import augsub
from models.lora import add_lora
from models.recipe import freeze, frozen_names
from models.weights import load_weights, without_lora


def small(name: str = "test_vit") -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, img_size=32).eval()


def test_adapters_and_head_learn_and_merge_into_the_plain_model():
    plain, model = small(), augsub.patch(small())
    images = torch.randn(2, 3, 32, 32)
    expected = plain(images)
    add_lora(model, rank=3, targets=["qkv", "attn.proj"])
    torch.testing.assert_close(model(images), expected)  # as B is 0
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name.startswith("head.") for name in learning) and len(learning) > 4

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(
            model(images, augsub="masking", augsub_ratio=0.5), torch.tensor([1, 2])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = model(images)
    assert (changed - expected).abs().max() > 0.01
    state = model.state_dict()
    plain.load_state_dict(without_lora(state))
    torch.testing.assert_close(plain(images), changed, rtol=1e-4, atol=1e-3)
    other = small()
    load_weights(other, {"model": state, "epoch": 3}, "run", complete=True)
    torch.testing.assert_close(other(images), changed, rtol=1e-4, atol=1e-3)


def test_a_state_dict_without_adapters_stays_as_it_is():
    state = small().state_dict()
    assert without_lora(state).keys() == state.keys()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "default"),
        ({"lora_bias": True}, "default"),
        ({}, "style"),
        ({"target_modules": ["patch_embed.proj"]}, "default"),
    ],
)
def test_adapters_of_another_kind_are_refused(settings, name):
    model = small()
    inject_adapter_in_model(LoraConfig(r=2, **{"target_modules": ["qkv"], **settings}), model, adapter_name=name)
    with pytest.raises(ValueError, match=r"\.lora_\w+.+: only LoRA of linear layers, named 'default', can be merged"):
        load_weights(small(), model.state_dict(), "adapted")


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(
        ValueError, match=r"lora.targets: the model has no linear layer named 'q_proj', but qkv, proj, fc1"
    ):
        add_lora(small(), 4, ["q_proj"])


def test_patterns_and_all_but_the_head_can_be_frozen():
    model = small()
    freeze(model, ["blocks.[0-2].*", "patch_embed"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name
        for name in dict(model.named_parameters())
        if name.startswith(("blocks.0", "blocks.1", "blocks.2", "patch_embed"))
    }
    model = small()
    freeze(model, ["all_but_head"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    with pytest.raises(ValueError, match=r"frozen: the model has no parameter like 'block.\*'"):
        frozen_names(model, ["block.*"])
