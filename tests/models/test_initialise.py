from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath, EvoNorm2dB0

import augsub
from models.initialise import freeze, frozen_batchnorms, make_drop_path_uniform, restart, start_class_token, start_head


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_uniform_drop_path_reaches_every_block(name):
    model = timm.create_model(name)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    make_drop_path_uniform(model, 0.3)
    ramped = timm.create_model(name, drop_path_rate=0.3)
    found = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert set(found) == {0.3}
    assert len(found) > sum(isinstance(module, DropPath) for module in ramped.modules())  # there the first is missing


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
    assert set(frozen) == {model.bn1, *(m for m in model.layer1.modules() if isinstance(m, torch.nn.BatchNorm2d))}
    assert frozen_batchnorms(model, []) == [model.bn1, *(m for m in frozen if m is not model.bn1)]  # as they are frozen
    assert frozen_batchnorms(timm.create_model("resnet10t"), []) == []


def test_every_layer_with_running_statistics_is_frozen_with_its_module():
    evonorm = torch.nn.Sequential(EvoNorm2dB0(4), EvoNorm2dB0(4))
    freeze(evonorm, ["0"])
    assert frozen_batchnorms(evonorm, ["0"]) == [evonorm[0]]
    without_parameters = torch.nn.Sequential(torch.nn.BatchNorm2d(3, affine=False), torch.nn.Linear(3, 3))
    assert frozen_batchnorms(without_parameters, ["1"]) == []
    assert frozen_batchnorms(without_parameters, ["0"]) == [without_parameters[0]]


def test_frozen_parts_do_not_learn():
    model = timm.create_model("test_vit")
    freeze(model, ["patch_embed", "pos_embed"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", *(f"patch_embed.{name}" for name, _ in model.patch_embed.named_parameters())}
