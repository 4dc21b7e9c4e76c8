"""Masking against an independent computation: masks drawn again from the seed, blocks run by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import augsub
from augsub.masking import STRATEGIES, cell_of_position, random_keep


def kept_cells(batch: int, cells: int, ratio: float) -> torch.Tensor:
    """Which cells stay, by the definition: the int(L * (1 - ratio)) lowest of one uniform draw after seed 11."""
    torch.manual_seed(11)
    noise = torch.rand(batch, cells)
    return noise.argsort(dim=1).argsort(dim=1) < int(cells * (1 - ratio))


def masked(model, images, **arguments):
    torch.manual_seed(11)
    return model(images, augsub={"name": "masking", **arguments})


@pytest.mark.parametrize("ratio", [0.25, 0.75])
@pytest.mark.parametrize(
    "variant", ["vit", "vit_avgpool_no_class_token", "vit_registers", "vit_dynamic_size", "clip", "deit_distilled"]
)
def test_vit_sub_model_is_its_blocks_on_the_kept_tokens(variant, ratio, make_model, images):
    model = augsub.patch(make_model(variant)).eval()
    logits, expected = masked(model, images, ratio=ratio), []
    for keep, image in zip(kept_cells(4, 16, ratio), images, strict=True):
        tokens = model._pos_embed(model.patch_embed(image[None]))
        prefix = model.num_prefix_tokens
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, keep]], dim=1)
        for block in (model.norm_pre, *model.blocks, model.norm):
            tokens = block(tokens)
        expected.append(model.forward_head(tokens))
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_swin_sub_model_sees_mask_tokens_in_the_hidden_cells(make_model, images):
    model = augsub.patch(make_model("swin")).eval()
    logits = masked(model, images, ratio=0.25, cell=8)
    hidden = ~kept_cells(4, 16, 0.25).view(4, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)  # 8 px: 4 tokens
    features = torch.where(hidden.unsqueeze(-1), model.mask_token[0, 0], model.patch_embed(images))
    torch.testing.assert_close(logits, model.forward_head(model.norm(model.layers(features))))


@pytest.mark.parametrize(("size", "cell"), [((32, 32), 8), ((40, 56), 16)], ids=["whole", "partial cells at the end"])
def test_resnet_sub_model_sees_zeros_in_the_hidden_cells(size, cell, make_model):
    model, images = augsub.patch(make_model("resnet")).eval(), torch.randn(3, 3, *size)
    logits = masked(model, images, ratio=0.75, cell=cell)
    rows, columns = (-(-side // cell) for side in size)
    visible = kept_cells(3, rows * columns, 0.75).view(3, 1, rows, columns).float()
    zeroed = images * F.interpolate(visible, scale_factor=cell, mode="nearest")[..., : size[0], : size[1]]
    assert 0.7 < (zeroed == 0).float().mean() < 0.9
    torch.testing.assert_close(logits, model(zeroed))


@pytest.mark.parametrize(("cells", "ratio", "kept"), [(196, 0.5, 98), (49, 0.5, 24), (25, 0.8, 4), (16, 0.9, 1)])
def test_number_of_kept_cells(cells, ratio, kept):
    indices = random_keep(3, cells, ratio, torch.device("cpu"))
    assert [len(set(row.tolist())) for row in indices] == [kept] * 3


@pytest.mark.parametrize(("positions", "side", "cell"), [(56, 224, 32), (149, 299, 32), (3, 10, 5), (25, 331, 32)])
def test_positions_lie_in_the_cell_of_their_centre(positions, side, cell):
    expected = [int((position + 0.5) * side / positions / cell) for position in range(positions)]
    assert cell_of_position(positions, side, cell, torch.device("cpu")).tolist() == expected


def test_one_draw_and_none_at_ratio_0_which_is_the_main_model(patched_model, images):
    cell = {} if augsub.supports(patched_model)["masking"] == "tokens" else {"cell": 8}
    for ratio, draws in ((0.5, (4, 16)), (0.0, (0,))):
        sub = masked(patched_model.eval(), images, ratio=ratio, **cell)
        after = torch.get_rng_state()
        torch.manual_seed(11)
        torch.rand(*draws)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(sub, patched_model(images)) == (ratio == 0)


def test_a_mode_can_be_insisted_on(make_model, images):
    model = augsub.patch(make_model("swin")).eval()
    default, *insisted = (
        masked(model, images, ratio=0.5, cell=8, mode=mode) for mode in (None, "mask_token", "zero_pixels")
    )
    assert [torch.equal(logits, default) for logits in insisted] == [True, False]


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("swin", {"cell": 33}, r"cell = 33 px is larger than the image of \(32, 32\) px"),
        ("resnet", {}, "ratio = 0.5 leaves none of 1 cells visible"),
        ("vit", {"ratio": 0.95}, "ratio = 0.95 leaves none of 16 cells visible"),
        ("vit", {"cell": 8}, "the model says what a cell is: leave it unset"),
        ("swin", {"mode": "drop_tokens"}, "masking has no site in SwinTransformer"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(family, arguments, message, make_model, images):
    with pytest.raises(ValueError, match=message):
        masked(augsub.patch(make_model(family)), images, **arguments)


class TestStrategies:
    GRID = (8, 10)

    def hidden(self, strategy: str, ratio: float) -> torch.Tensor:
        """Cells of 64 samples, (64, 8, 10)."""
        torch.manual_seed(0)
        kept = STRATEGIES[strategy](64, self.GRID, ratio, torch.device("cpu"))
        assert kept.shape == (64, int(80 * (1 - ratio)))
        return torch.ones(64, 80).scatter(1, kept, 0).view(64, *self.GRID).bool()

    @pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
    def test_a_block_is_a_rectangle_up_to_one_row_or_column(self, ratio):
        """Which cells of its last, incomplete side are hidden is open."""
        hidden, shapes = self.hidden("block", ratio), set()
        for cells in hidden:
            rows, columns = cells.any(1).nonzero(), cells.any(0).nonzero()
            height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert cells.sum() >= height * width - max(height, width)
            shapes.add((height, width))
        assert len(shapes) > 1 and len({tuple(cells.flatten().tolist()) for cells in hidden}) > 20

    def test_a_grid_of_half_is_a_chequerboard(self):
        hidden = self.hidden("grid", 0.5)
        assert (hidden[:, 1:] != hidden[:, :-1]).all() and (hidden[..., 1:] != hidden[..., :-1]).all()
        assert 0 < hidden[:, 0, 0].sum() < 64

    def test_a_grid_of_three_quarters_keeps_one_of_each_four(self):
        visible = (~self.hidden("grid", 0.75)).float()[:, None]
        assert (F.avg_pool2d(visible, 2) == 0.25).all()

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize(("variant", "cell"), [("vit", None), ("swin", 8), ("resnet", 8)])
    def test_every_family_hides_as_many(self, make_model, images, strategy, variant, cell):
        model = augsub.patch(make_model(variant))
        found = masked(model, images, ratio=0.5, cell=cell, strategy=strategy)
        random = masked(model, images, ratio=0.5, cell=cell)
        assert found.shape == random.shape and torch.equal(found, random) == (strategy == "random")

    def test_bad_ones_are_refused(self, make_model, images):
        with pytest.raises(ValueError, match=r"masking: strategy = 'blok', allowed are random, block, grid"):
            augsub.build("masking", ratio=0.5, strategy="blok")
        spec = [{"name": "masking", "ratio": 0.5}, {"name": "masking", "ratio": 0.5, "strategy": "grid"}]
        with pytest.raises(ValueError, match=r"strategy = 'grid': the tokens form no grid any more; put it first"):
            augsub.patch(make_model("vit"))(images, augsub=spec)
