from __future__ import annotations

import logging

import pytest
import torch

import augsub
from models.build import build_model, check_image_shape


def test_a_model_is_built_for_the_data_and_patched():
    model = build_model(
        "vit_tiny_patch16_224", num_classes=7, in_chans=1, image_size=32, drop_path_rate=0.1, depth=2, patch_size=8
    )
    assert augsub.is_patched(model)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert len(model.blocks) == 2
    resnet = build_model("resnet18", num_classes=7, in_chans=3, image_size=50)  # takes any size, no img_size argument
    assert resnet(torch.randn(2, 3, 50, 50)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_tiny_patch16_242", {}, "timm has no model 'vit_tiny_patch16_242', did you mean 'vit_tiny_patch16_224'?"),
        ("vit_tiny_patch16_224", {"embed_dim": 100, "num_heads": 3}, "cannot build vit_tiny_patch16_224"),
    ],
)
def test_models_that_cannot_be_built_are_refused(name, kwargs, message):
    with pytest.raises(ValueError) as error:
        build_model(name, num_classes=7, in_chans=3, image_size=32, **kwargs)
    assert message in str(error.value)


def test_sizes_are_checked_without_computing(caplog):
    model = build_model("vit_tiny_patch16_224", num_classes=7, in_chans=3, image_size=224)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_image_shape(model, (3, 224, 224), [augsub.build("masking"), augsub.build("random_crop", ratio=0.5)])
    with pytest.raises(ValueError, match="200 x 200 pixels do not fit: Input height"):
        check_image_shape(model, (3, 200, 200))
    with pytest.raises(ValueError, match=r"ratio = 0\.999 leaves none of 196 cells visible"):
        check_image_shape(model, (3, 224, 224), [augsub.build("masking", ratio=0.999)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and not value.is_meta
    with caplog.at_level(logging.WARNING):
        check_image_shape(build_model("vit_tiny_patch16_224", num_classes=7, in_chans=3, image_size=40), (3, 40, 40))
    assert "40 x 40 pixels are no multiple of the patch size" in caplog.text
