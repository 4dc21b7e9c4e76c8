from __future__ import annotations

import pytest
import timm
from torch import nn

import augsub
from models.build import build_on_meta
from models.param_groups import param_groups


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """(weight decay, lr scale) of every parameter, each of which is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = [
        (names[parameter], (group["weight_decay"], group["lr_scale"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(settings) == len(dict(settings))
    return dict(settings)


@pytest.mark.parametrize("name", ["test_vit", "deit3_small_patch16_224", "resnet18", "convnext_atto"])
def test_every_tensor_that_learns_is_in_one_group_of_its_settings(name):
    model = augsub.patch(build_on_meta(name))
    groups = param_groups(model, 0.05)
    assert len(groups) == 2 and by_name(model, groups) == {
        key: (0.0 if parameter.ndim < 2 or key in model.no_weight_decay() else 0.05, 1.0)
        for key, parameter in model.named_parameters()
    }
    layers = by_name(model, param_groups(model, 0.05, layer_decay=0.7))
    assert {key: decay for key, (decay, _) in layers.items()} == {
        key: decay for key, (decay, _) in by_name(model, groups).items()
    }


def test_groups_follow_the_order_of_the_model():
    """A checkpoint of the optimiser numbers its states by it."""
    model = timm.create_model("test_resnet")
    order = [parameter for group in param_groups(model, 0.05) for parameter in group["params"]]
    decays = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert order[0] is model.conv1[0].weight
    assert all(one is other for one, other in zip(order, decays, strict=False))


def test_layers_and_modules_at_the_full_rate():
    model = build_on_meta("test_vit")
    groups = by_name(model, param_groups(model, 0.05, layer_decay=0.5, full_lr=["norm", "blocks.0.mlp"]))
    depth = len(model.blocks)
    for block in range(depth):
        assert groups[f"blocks.{block}.attn.qkv.weight"] == (0.05, pytest.approx(0.5 ** (depth - block)))
    assert groups["patch_embed.proj.weight"][1] == pytest.approx(0.5 ** (depth + 1))
    assert groups["norm.weight"][1] == groups["blocks.0.mlp.fc1.weight"][1] == groups["head.weight"][1] == 1.0
    with pytest.raises(ValueError, match="the model has no module 'nrom'"):
        param_groups(model, 0.05, layer_decay=0.5, full_lr=["nrom"])


def test_the_mask_token_has_no_decay_and_what_is_frozen_has_no_group():
    model = augsub.patch(build_on_meta("swin_tiny_patch4_window7_224"))
    model.patch_embed.requires_grad_(False)
    groups = by_name(model, param_groups(model, 0.05, layer_decay=0.7))
    assert groups["mask_token"] == (0.0, 1.0)
    assert not any(name.startswith("patch_embed") for name in groups)
    assert groups["layers.0.blocks.0.attn.relative_position_bias_table"][0] == 0.0
    with pytest.raises(ValueError, match=r"layer_decay: the model does not tell the order of its layers"):
        param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.0, layer_decay=0.5)
