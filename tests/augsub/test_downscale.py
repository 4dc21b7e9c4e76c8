"""Downscale: fewer pixels of the whole image, for a ViT with its own position embedding resampled."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import augsub
from tests.conftest import VIT, tiny_resnet, tiny_swin, tiny_vit


def shrunk(images: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


@pytest.mark.parametrize(("ratio", "side"), [(0.5, 24), (0.75, 16), (0.9, 8)])
def test_a_vit_is_that_of_the_smaller_size(images, ratio, side):
    """As timm builds it, with the position embedding resampled as it does for a checkpoint of another size."""
    torch.manual_seed(0)
    model = augsub.patch(tiny_vit()).eval()
    state = copy.deepcopy(augsub.unpatch(copy.deepcopy(model)).state_dict())
    smaller = VisionTransformer(**{**VIT, "img_size": side})
    new_size = (side // 8, side // 8)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=new_size, num_prefix_tokens=1)
    smaller.load_state_dict(state)
    found = model(images, augsub="downscale", augsub_ratio=ratio)
    torch.testing.assert_close(found, smaller.eval()(shrunk(images, side)), rtol=1e-4, atol=1e-5)
    assert not model.dynamic_img_size and model.patch_embed.flatten and model.patch_embed.strict_img_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_is_the_rounded_image(images, dtype):
    model = augsub.patch(tiny_vit()).eval().to(dtype)
    found = model(images.to(dtype), augsub="downscale", augsub_ratio=0.5)
    own = augsub.patch(tiny_vit()).eval()
    own.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = own(images, augsub="downscale", augsub_ratio=0.5)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)


def test_others_see_the_smaller_image():
    model, images = augsub.patch(tiny_resnet()).eval(), torch.randn(3, 3, 128, 160)
    expected = F.interpolate(images, size=(96, 128), mode="bilinear", antialias=True)  # 90.5 and 113 to 32s
    torch.testing.assert_close(model(images, augsub="downscale", augsub_ratio=0.5), model(expected))


@pytest.mark.parametrize(("name", "stride"), [("vit_small_r26_s32_224", 32), ("vitamin_small_224", 16)])
def test_the_stride_of_a_hybrid_is_that_of_its_tokens(name, stride):
    model, seen = augsub.patch(timm.create_model(name, num_classes=2)).eval(), []
    model.patch_embed.register_forward_pre_hook(lambda _, images: seen.append(images[0].shape[-1]))
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224), augsub="downscale", augsub_ratio=0.5)
    assert seen == [round(224 * 0.5**0.5 / stride) * stride]


def test_images_larger_than_a_swin_was_built_for():
    model = augsub.patch(tiny_swin(strict_img_size=False)).eval()
    images = torch.randn(2, 3, 48, 48)
    expected = model(shrunk(images, 40))
    torch.testing.assert_close(model(images, augsub="downscale", augsub_ratio=0.3), expected)


def test_nothing_is_drawn_and_ratio_0_is_the_main_model(images):
    model = augsub.patch(tiny_swin()).eval()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    assert not torch.equal(model(images, augsub="downscale", augsub_ratio=0.5), model(images))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(model(images, augsub="downscale", augsub_ratio=0), model(images))


def test_masking_goes_on_the_smaller_grid(images):
    model, seen = augsub.patch(tiny_vit()).eval(), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(images, augsub=[{"name": "downscale", "ratio": 0.5}, {"name": "masking", "ratio": 0.5}])
    assert seen == [1 + 4]  # of 3 x 3 patches


def test_what_cannot_become_smaller_says_so(images):
    model = augsub.patch(tiny_resnet())
    with pytest.raises(ValueError, match=r"downscale: ratio = 0\.5 allows no smaller size than 32 x 32"):
        model(images, augsub="downscale", augsub_ratio=0.5)
