from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import augsub
from tests.conftest import VIT


def corners(batch: int, spans: tuple[int, int]) -> list[tuple[int, int]]:
    torch.manual_seed(4)
    return [(int(u * (spans[0] + 1)), int(v * (spans[1] + 1))) for u, v in torch.rand(batch, 2).tolist()]


def cropped(model, images, ratio):
    torch.manual_seed(4)
    return model.eval()(images, augsub="random_crop", augsub_ratio=ratio)


def crops(images: torch.Tensor, side: int) -> torch.Tensor:
    spans = (images.shape[2] - side, images.shape[3] - side)
    places = zip(images, corners(len(images), spans), strict=True)
    return torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in places])


@pytest.mark.parametrize(
    ("grid", "ratio", "side"),
    [((4, 4), 0.5, 3), ((4, 4), 0.25, 3), ((4, 4), 0.75, 2), ((4, 4), 0.9, 1), ((4, 7), 0.5, 4)],
)
def test_vit_keeps_a_window_of_its_grid(grid, ratio, side):
    height, width = (8 * cells for cells in grid)
    model, images = (
        augsub.patch(VisionTransformer(**{**VIT, "img_size": (height, width)})),
        torch.randn(4, 3, height, width),
    )
    logits, tokens = cropped(model, images, ratio), model._pos_embed(model.patch_embed(images))
    window = crops(tokens[:, 1:].mT.unflatten(2, grid), side).flatten(2).mT
    expected = model.forward_head(model.norm(model.blocks(torch.cat([tokens[:, :1], window], dim=1))))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_resnet_sees_a_crop_of_the_input(make_model):
    images, model = torch.randn(3, 3, 96, 128), augsub.patch(make_model("resnet"))
    side = 64  # half of sqrt(96 * 128) = 55.4, to a multiple of the stride 32
    torch.testing.assert_close(cropped(model, images, 0.75), model(crops(images, side)))


def central_part(table: torch.Tensor, window: int) -> torch.Tensor:
    """Position biases (offsets, heads) of a window, out of those of a larger one."""
    side = int(len(table) ** 0.5)
    border = (side - (2 * window - 1)) // 2
    square = table.view(side, side, -1)
    return square[border : side - border, border : side - border].flatten(0, 1)


def test_swin_sees_a_crop_through_smaller_windows_of_the_same_weights():
    """Against a Swin that timm builds for the size of the crop, with windows scaled as the image."""
    shape = {"patch_size": 4, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "num_classes": 10}
    images = torch.randn(3, 3, 128, 128)
    model = augsub.patch(SwinTransformer(img_size=128, window_size=8, **shape))
    scaled = SwinTransformer(img_size=96, window_size=6, **shape).eval()
    state = {name: value for name, value in model.state_dict().items() if name in scaled.state_dict()}
    scaled.load_state_dict({n: central_part(value, 6) if "bias_table" in n else value for n, value in state.items()})
    torch.testing.assert_close(cropped(model, images, 0.5), scaled(crops(images, 96)))
    with pytest.raises(AssertionError, match="doesn't match"):
        model(crops(images, 96))


def test_crop_before_masking_but_not_after(make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    crop, mask = {"name": "random_crop", "ratio": 0.5}, {"name": "masking", "ratio": 0.5}
    assert model(images, augsub=[crop, mask]).isfinite().all()
    with pytest.raises(ValueError, match="put random_crop before"):
        model(images, augsub=[mask, crop])


def test_ratio_0_is_the_main_model(patched_model, images):
    assert torch.equal(cropped(patched_model, images, 0), patched_model(images))


def test_a_crop_that_leaves_the_image_whole_is_refused(make_model, images):
    with pytest.raises(ValueError, match="allows no crop of 32 x 32: its side must be a multiple of 32 and smaller"):
        cropped(augsub.patch(make_model("resnet")), images, 0.5)
