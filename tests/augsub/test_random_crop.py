from __future__ import annotations

import pytest
import torch

import augsub


def corners(seed: int, batch: int, spans: tuple[int, int]) -> list[tuple[int, int]]:
    torch.manual_seed(seed)
    return [(int(u * (spans[0] + 1)), int(v * (spans[1] + 1))) for u, v in torch.rand(batch, 2).tolist()]


@pytest.mark.parametrize(("ratio", "side"), [(0.5, 3), (0.25, 3), (0.75, 2), (0.9, 1)])
def test_vit_keeps_a_window_of_its_grid(ratio, side, make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    torch.manual_seed(4)
    logits = model(images, augsub="random_crop", augsub_ratio=ratio)
    expected = []
    for image, (top, left) in zip(images, corners(4, 4, (4 - side, 4 - side)), strict=True):
        tokens = model._pos_embed(model.patch_embed(image[None]))
        window = tokens[:, 1:].view(1, 4, 4, -1)[:, top : top + side, left : left + side].flatten(1, 2)
        tokens = model.norm(model.blocks(torch.cat([tokens[:, :1], window], dim=1)))
        expected.append(model.forward_head(tokens))
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_resnet_sees_a_crop_of_the_input(make_model):
    images = torch.randn(3, 3, 96, 128)
    model = augsub.patch(make_model("resnet")).eval()
    torch.manual_seed(4)
    logits = model(images, augsub="random_crop", augsub_ratio=0.75)
    side = 64  # half of sqrt(96 * 128) = 55.4, to a multiple of the stride 32
    crops = [
        image[:, top : top + side, left : left + side]
        for image, (top, left) in zip(images, corners(4, 3, (96 - side, 128 - side)), strict=True)
    ]
    torch.testing.assert_close(logits, model(torch.stack(crops)))


def test_swin_takes_the_smaller_input_only_in_the_sub_forward(make_model, images):
    """Against a Swin built for any input size, with the same weights."""
    model = augsub.patch(make_model("swin")).eval()
    torch.manual_seed(4)
    logits = model(images, augsub="random_crop", augsub_ratio=0.75)
    any_size = augsub.patch(make_model("swin")).eval()
    any_size.load_state_dict(model.state_dict())
    augsub.unpatch(any_size)
    any_size.patch_embed.strict_img_size = False
    for stage in any_size.layers:
        for block in stage.blocks:
            block.dynamic_mask = True
    crops = [
        image[:, top : top + 16, left : left + 16]
        for image, (top, left) in zip(images, corners(4, 4, (16, 16)), strict=True)
    ]
    torch.testing.assert_close(logits, any_size(torch.stack(crops)))
    with pytest.raises(AssertionError, match="doesn't match"):
        model(torch.stack(crops))


def test_crop_before_masking_but_not_after(make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    crop, mask = {"name": "random_crop", "ratio": 0.5}, {"name": "masking", "ratio": 0.5}
    assert model(images, augsub=[crop, mask]).isfinite().all()
    with pytest.raises(ValueError, match="put random_crop before"):
        model(images, augsub=[mask, crop])


def test_ratio_0_is_the_main_model(patched_model, images):
    patched_model.eval()
    assert torch.equal(patched_model(images, augsub="random_crop", augsub_ratio=0), patched_model(images))


def test_a_crop_that_leaves_the_image_whole_is_refused(make_model, images):
    with pytest.raises(ValueError, match="allows no crop of 32 x 32: its side must be a multiple of 32 and smaller"):
        augsub.patch(make_model("resnet"))(images, augsub="random_crop", augsub_ratio=0.5)
