from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath, EvoNorm2dB0
from torch import nn

import augsub
from models.build import build_on_meta
from models.recipe import (
    freeze,
    frozen_batchnorms,
    make_drop_path_uniform,
    param_groups,
    restart,
    start_class_token,
    start_head,
)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_uniform_drop_path_reaches_every_block(name):
    model = timm.create_model(name)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    make_drop_path_uniform(model, 0.3)
    ramped = timm.create_model(name, drop_path_rate=0.3)
    found = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert set(found) == {0.3}
    assert len(found) > sum(isinstance(module, DropPath) for module in ramped.modules())  # there the first is missing


def test_uniform_drop_path_erases_no_image():
    """Some of its blocks have no residual connection: there a dropped branch is all that there is."""
    model = timm.create_model("mobilevit_xxs", num_classes=5)
    make_drop_path_uniform(model, 0.9)
    erased = []
    model.stages[-1].register_forward_hook(lambda _, args, output: erased.append(not output.flatten(1).any(1).all()))
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 64, 64))
    assert erased == [False]


def test_parts_start_anew():
    model = timm.create_model("test_vit", num_classes=1000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    restart(model, ["norm"])
    start_head(model, std=2e-5, bias_bound=1e-3)
    start_class_token(model, std=0.02)
    assert (model.norm.weight == 1).all() and (model.norm.bias == 0).all()
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert 0 < model.head.bias.abs().max() <= 1e-3
    assert 0.01 < model.cls_token.std() < 0.03
    assert (model.blocks[0].attn.qkv.weight == 7).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test_vit", lambda model: freeze(model, ["patch_embd"]), "frozen: the model has no part named 'patch_embd'"),
        ("test_vit", lambda model: restart(model, ["nrom"]), "restart: the model has no part named 'nrom'"),
        ("resnet18", lambda model: start_class_token(model, 0.02), "the model has no class token"),
        ("resnet18", lambda model: start_head(model.eval().layer1, 0.02), "is no linear layer"),
        ("test_vit", lambda model: freeze(model, [""]), "frozen: nothing is left to learn"),
        (
            "swin_tiny_patch4_window7_224",  # but for the mask token
            lambda model: freeze(model, ["patch_embed", "layers", "norm", "head"]),
            "frozen: nothing is left to learn",
        ),
    ],
)
def test_what_cannot_be_done_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        change(augsub.patch(timm.create_model(name)))


def test_batchnorms_are_frozen_with_their_module_or_their_parameters():
    model = timm.create_model("resnet10t", num_classes=10)
    names = ["bn1.weight", "bn1.bias", "layer1", "layer2.0.bn1.weight"]
    freeze(model, names)
    frozen = frozen_batchnorms(model, names)
    assert set(frozen) == {model.bn1, *(m for m in model.layer1.modules() if isinstance(m, nn.BatchNorm2d))}
    assert frozen_batchnorms(model, []) == [model.bn1, *(m for m in frozen if m is not model.bn1)]  # as they are frozen
    assert frozen_batchnorms(timm.create_model("resnet10t"), []) == []


def test_every_layer_with_running_statistics_is_frozen_with_its_module():
    evonorm = nn.Sequential(EvoNorm2dB0(4), EvoNorm2dB0(4))
    freeze(evonorm, ["0"])
    assert frozen_batchnorms(evonorm, ["0"]) == [evonorm[0]]
    without_parameters = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Linear(3, 3))
    assert frozen_batchnorms(without_parameters, ["1"]) == []
    assert frozen_batchnorms(without_parameters, ["0"]) == [without_parameters[0]]


def test_frozen_parts_do_not_learn():
    model = timm.create_model("test_vit")
    freeze(model, ["patch_embed", "pos_embed"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", *(f"patch_embed.{name}" for name, _ in model.patch_embed.named_parameters())}


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
