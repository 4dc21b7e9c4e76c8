from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import augsub
from models.param_groups import param_groups

NAMES = ("test_vit", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "convnext_atto", "test_eva")


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return augsub.patch(timm.create_model(name))


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """(weight decay, lr scale) of every parameter, each of which is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = [
        (names[id(parameter)], (group["weight_decay"], group.get("lr_scale", 1.0)))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(settings) == len(dict(settings))
    return dict(settings)


@pytest.mark.parametrize("name", [name for name in NAMES if timm.is_model(name)])
def test_groups_are_timms(name):
    model = build(name)
    undecayed = model.no_weight_decay()
    timms = by_name(model, param_groups_weight_decay(model, 0.05, no_weight_decay_list=undecayed))
    assert by_name(model, param_groups(model, 0.05)) == timms
    timms = by_name(model, param_groups_layer_decay(model, 0.05, no_weight_decay_list=undecayed, layer_decay=0.7))
    ours = by_name(model, param_groups(model, 0.05, layer_decay=0.7))
    assert ours.keys() == timms.keys()
    assert all(ours[key] == pytest.approx(timms[key]) for key in ours)


def test_the_mask_token_has_no_decay_and_what_is_frozen_has_no_group():
    model = build("swin_tiny_patch4_window7_224")
    model.patch_embed.requires_grad_(False)
    groups = by_name(model, param_groups(model, 0.05, layer_decay=0.7))
    assert groups["mask_token"] == (0.0, 1.0)
    assert not any(name.startswith("patch_embed") for name in groups)
    assert groups["layers.0.blocks.0.attn.relative_position_bias_table"][0] == 0.0


def test_modules_at_the_full_rate():
    model = build("test_vit")
    groups = by_name(model, param_groups(model, 0.05, layer_decay=0.5, full_lr=["norm", "blocks.0.mlp"]))
    assert groups["norm.weight"][1] == groups["blocks.0.mlp.fc1.weight"][1] == groups["head.weight"][1] == 1.0
    assert groups["blocks.0.attn.qkv.weight"][1] < 1
    with pytest.raises(ValueError, match="the model has no module 'nrom'"):
        param_groups(model, 0.05, layer_decay=0.5, full_lr=["nrom"])


def test_a_model_that_does_not_tell_its_layers():
    with pytest.raises(ValueError, match=r"layer_decay: the model does not tell the order of its layers"):
        param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.0, layer_decay=0.5)
