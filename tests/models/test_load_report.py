"""What is loaded of a checkpoint, what stays new, what is named and what is refused."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import augsub
from models.weights import load_weights
from tests.zoo import load_rows


def test_a_swin_of_ours_brings_its_mask_token(make_model):
    source = augsub.patch(make_model("swin"))
    model = augsub.patch(make_model("swin"))
    report = load_weights(model, {"model": source.state_dict(), "iteration": 3}, "last.pt")
    assert report.initial == report.unexpected == ()
    assert torch.equal(model.mask_token, source.mask_token)
    plain = augsub.patch(make_model("swin"))
    token = plain.mask_token.detach().clone()
    assert load_weights(plain, make_model("swin").state_dict(), "timm.pth").initial == ()
    assert torch.equal(plain.mask_token, token)


def test_deit3s_own_names_of_layer_scale():
    model = timm.create_model("deit3_small_patch16_224", depth=1, init_values=0.3)
    weights = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): torch.rand_like(value)
        for name, value in model.state_dict().items()
    }
    report = load_weights(model, {"model": weights}, "deit_3_small_224_1k.pth")
    assert report.initial == report.unexpected == ()
    assert torch.equal(model.blocks[0].ls1.gamma, weights["blocks.0.gamma_1"])


def test_a_head_for_other_classes_stays_new_and_is_named(make_model, caplog):
    source = timm.create_model("test_vit", num_classes=7)
    model = augsub.patch(timm.create_model("test_vit", num_classes=5))
    head = model.head.weight.detach().clone()
    with caplog.at_level(logging.INFO):
        report = load_weights(model, source.state_dict(), "other.pth")
        report.log("other.pth")
    assert report.other_classes == {"head.bias": (7,), "head.weight": (7, 64)}
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert "the head is new, the checkpoint's is for other classes: head.bias, head.weight" in caplog.text


def tiny(**kwargs) -> nn.Module:
    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **kwargs})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda model: timm.create_model("resnet18").state_dict(), r"fills 0 of 32 .* 122 unknown ones \(bn1.bias, "),
        (lambda model: tiny(mlp_ratio=2.0).state_dict(), r"fills 26 of 32 .*blocks.0.mlp.fc1.bias is \(96,\)"),
        (lambda model: tiny(depth=3).state_dict(), r"fills 32 of 32 tensors and has 12 unknown ones"),
        (lambda model: {"model": {"epoch": 3}}, r"weights.pth holds no state dict"),
        (lambda model: {}, r"weights.pth holds no state dict"),
        (lambda model: dict(list(model.state_dict().items())[:3]), r"fills 3 of 32 tensors and has 0 unknown ones"),
    ],
)
def test_what_is_no_checkpoint_of_this_model(content, message):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = content(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights, "weights.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["levit_128s", "coat_tiny", "swin_tiny_patch4_window7_224", "hiera_tiny_224"])
@pytest.mark.parametrize("alien", ["test_resnet", "test_convnext", "beit_base_patch16_224"])
def test_weights_of_another_class_are_refused(name, alien):
    with torch.device("meta"):
        model, other = timm.create_model(name), timm.create_model(alien)
    with pytest.raises(ValueError, match=r"checkpoint alien.pth is of another model: "):
        load_weights(model, other.state_dict(), "alien.pth")


@pytest.mark.parametrize(("source", "target"), [(18, 34), (34, 18)])
def test_a_relative_of_another_depth_is_refused(source, target):
    with torch.device("meta"):
        model, other = timm.create_model(f"resnet{target}"), timm.create_model(f"resnet{source}")
    with pytest.raises(ValueError, match=r"of another model: it fills \d+ of \d+ tensors"):
        load_weights(model, other.state_dict(), "relative.pth")


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in load_rows() if row.params < 120], ids=lambda row: row.smallest)
def test_every_class_of_timm_takes_its_own_weights_back(row):
    """timm's conversions of other layouts must leave checkpoints of ours as they are."""
    source, model = (augsub.patch(timm.create_model(row.smallest)) for _ in range(2))
    report = load_weights(model, {"model": source.state_dict()}, "last.pt")
    assert report.initial == report.unexpected == () and not report.resized
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())
