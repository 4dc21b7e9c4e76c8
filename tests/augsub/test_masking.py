"""Masking against an independent computation: masks drawn again from the seed, blocks run by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import augsub
from augsub.masking import cell_of_position, random_keep


def kept_cells(seed: int, batch: int, cells: int, ratio: float) -> torch.Tensor:
    """Which cells stay, by the definition: the int(L * (1 - ratio)) lowest of one uniform draw."""
    torch.manual_seed(seed)
    noise = torch.rand(batch, cells)
    return noise.argsort(dim=1).argsort(dim=1) < int(cells * (1 - ratio))


@pytest.mark.parametrize(
    "variant", ["vit", "vit_avgpool_no_class_token", "vit_registers", "vit_dynamic_size", "clip", "deit_distilled"]
)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_vit_sub_model_is_its_blocks_on_the_kept_tokens(variant, ratio, make_model, images):
    model = augsub.patch(make_model(variant)).eval()
    torch.manual_seed(11)
    logits = model(images, augsub="masking", augsub_ratio=ratio)

    keep = kept_cells(11, batch=4, cells=16, ratio=ratio)
    expected = []
    for sample, image in zip(keep, images, strict=True):
        tokens = model._pos_embed(model.patch_embed(image[None]))
        prefix = model.num_prefix_tokens
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, sample]], dim=1)
        assert tokens.shape[1] == prefix + int(16 * (1 - ratio))
        for block in (model.norm_pre, *model.blocks, model.norm):
            tokens = block(tokens)
        expected.append(model.forward_head(tokens))
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_swin_sub_model_sees_mask_tokens_in_the_hidden_cells(make_model, images):
    model = augsub.patch(make_model("swin")).eval()
    torch.manual_seed(11)
    logits = model(images, augsub={"name": "masking", "ratio": 0.25, "cell": 8})

    keep = kept_cells(11, batch=4, cells=16, ratio=0.25).view(4, 4, 4)
    features = model.patch_embed(images)
    assert features.shape == (4, 16, 16, 16)
    for sample in range(4):
        for row in range(16):
            for column in range(16):
                if not keep[sample, row // 4, column // 4]:  # 8 pixels are 4 tokens
                    features[sample, row, column] = model.mask_token[0, 0]
    expected = model.forward_head(model.norm(model.layers(features)))
    torch.testing.assert_close(logits, expected)


def test_resnet_sub_model_sees_zeros_in_the_hidden_cells(make_model, images):
    model = augsub.patch(make_model("resnet")).eval()
    torch.manual_seed(11)
    logits = model(images, augsub={"name": "masking", "ratio": 0.75, "cell": 8})
    visible = kept_cells(11, batch=4, cells=16, ratio=0.75).view(4, 1, 4, 4).float()
    masked = images * F.interpolate(visible, scale_factor=8, mode="nearest")
    assert (masked == 0).float().mean() > 0.7
    torch.testing.assert_close(logits, model(masked))


@pytest.mark.parametrize(
    ("cells", "ratio", "kept"),
    [(196, 0.5, 98), (144, 0.5, 72), (121, 0.5, 60), (256, 0.5, 128), (49, 0.5, 24), (25, 0.8, 4), (16, 0.9, 1)],
)
def test_number_of_kept_cells(cells, ratio, kept):
    indices = random_keep(3, cells, ratio, torch.device("cpu"))
    assert indices.shape == (3, kept)
    assert all(len(set(row.tolist())) == kept for row in indices)


def test_partial_cells_at_the_end_of_a_side(make_model):
    images = torch.randn(2, 3, 40, 56)
    model = augsub.patch(make_model("resnet")).eval()
    torch.manual_seed(5)
    logits = model(images, augsub={"name": "masking", "ratio": 0.5, "cell": 16})
    visible = kept_cells(5, batch=2, cells=3 * 4, ratio=0.5).view(2, 3, 4)
    masked = images.clone()
    for sample in range(2):
        for row in range(3):
            for column in range(4):
                if not visible[sample, row, column]:
                    masked[sample, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 0
    torch.testing.assert_close(logits, model(masked))


@pytest.mark.parametrize(("positions", "side", "cell"), [(56, 224, 32), (149, 299, 32), (3, 10, 5), (25, 331, 32)])
def test_positions_lie_in_the_cell_of_their_centre(positions, side, cell):
    expected = [int((position + 0.5) * side / positions / cell) for position in range(positions)]
    assert cell_of_position(positions, side, cell, torch.device("cpu")).tolist() == expected


def test_ratio_0_is_the_main_model_and_draws_nothing(patched_model, images):
    patched_model.eval()
    state = torch.get_rng_state()
    assert torch.equal(patched_model(images, augsub="masking", augsub_ratio=0.0), patched_model(images))
    assert torch.equal(torch.get_rng_state(), state)


def test_exactly_one_draw(patched_model, images):
    cells = {"vit": 16}.get(type(patched_model).__name__, 16)
    cell = {} if "tokens" in patched_model._augsub.sites else {"cell": 8}
    patched_model.eval()
    torch.manual_seed(2)
    patched_model(images, augsub={"name": "masking", "ratio": 0.5, **cell})
    after = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(4, cells)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("mode", ["mask_token", "zero_pixels"])
def test_a_mode_can_be_insisted_on(mode, make_model, images):
    model = augsub.patch(make_model("swin")).eval()
    torch.manual_seed(11)
    logits = model(images, augsub={"name": "masking", "ratio": 0.5, "cell": 8, "mode": mode})
    default = augsub.build({"name": "masking", "ratio": 0.5, "cell": 8})
    torch.manual_seed(11)
    assert torch.equal(logits, model(images, augsub=default)) == (mode == "mask_token")


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("swin", {"ratio": 0.5, "cell": 33}, "cell = 33 px is larger than the image of (32, 32) px"),
        ("resnet", {"ratio": 0.5}, "ratio = 0.5 leaves none of 1 cells visible"),
        ("vit", {"ratio": 0.95}, "ratio = 0.95 leaves none of 16 cells visible"),
        ("vit", {"ratio": 0.5, "cell": 8}, "the model says what a cell is: leave it unset"),
        ("swin", {"ratio": 0.5, "mode": "drop_tokens"}, "masking has no site in SwinTransformer"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(family, arguments, message, make_model, images):
    model = augsub.patch(make_model(family))
    with pytest.raises(ValueError) as error:
        model(images, augsub={"name": "masking", **arguments})
    assert message in str(error.value)
