"""Where augmentations act in families of other kinds, against independent computations."""

from __future__ import annotations

import pytest
import torch
import transformers
from timm.models.beit import Beit
from timm.models.crossvit import CrossVit
from timm.models.davit import DaVit
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

import augsub

ROTARY = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
ROTARY |= {"use_rot_pos_emb": True, "use_abs_pos_emb": False}


def masked(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model = model if augsub.is_patched(model) else augsub.patch(model)
    torch.manual_seed(5)
    return model(images, augsub="masking", augsub_ratio=0.5)


def kept_cells(batch: int, cells: int) -> torch.Tensor:
    """Cells of lowest noise per sample, in order, from one draw (batch, cells)."""
    torch.manual_seed(5)
    return torch.rand(batch, cells).argsort(1)[:, : cells // 2].sort(1).values


def test_rotary_embeddings_go_with_their_tokens():
    images, expected = torch.randn(3, 3, 64, 64), []
    model = Eva(**ROTARY).eval()
    tokens, rotary = model._pos_embed(model.patch_embed(images))
    for sample, kept in zip(tokens, kept_cells(3, 16), strict=True):
        x = torch.cat([sample[:1], sample[1:][kept]])[None]
        for block in model.blocks:
            x = block(x, rope=rotary[kept])
        expected.append(model.forward_head(model.norm(x)))
    torch.testing.assert_close(masked(model, images), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert augsub.unpatch(model).patch_drop is None


def test_the_models_own_patch_dropout_comes_first():
    """Of the 8 tokens that it leaves, masking keeps 4, each with its own rotary embedding."""
    model = augsub.patch(Eva(**ROTARY, patch_drop_rate=0.5)).train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(torch.randn(2, 3, 64, 64), augsub="masking", augsub_ratio=0.5)
    ((x,), kwargs), *_ = seen
    assert x.shape == (2, 1 + 4, 48)
    assert kwargs["rope"].shape[-2] == 4


def test_hiera_drops_the_mask_units_that_timm_would_drop():
    images = torch.randn(2, 3, 128, 128)
    model = Hiera(img_size=(128, 128), embed_dim=24, num_heads=1, stages=(1, 1, 2, 1), num_classes=10).eval()
    keep = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, kept_cells(2, 16), True)
    expected = model.forward_head(model.forward_features(images, mask=keep))
    torch.testing.assert_close(masked(model, images), expected, rtol=1e-4, atol=1e-5)


STEMS = {
    "NLC": lambda: Beit(img_size=64, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=10),
    "NHWC": lambda: VisionTransformerSAM(img_size=64, patch_size=16, embed_dim=24, depth=1, num_heads=2),
    "NCHW": lambda: DaVit(depths=(1, 1), embed_dims=(24, 32), num_heads=(2, 2), num_classes=10),
}


@pytest.mark.parametrize("layout", STEMS)
def test_stem_features_become_the_mask_token_where_a_cell_is_hidden(layout):
    model, images, seen = augsub.patch(STEMS[layout]()).eval(), torch.randn(2, 3, 64, 64), []
    stem = model.stem if layout == "NCHW" else model.patch_embed
    stem.register_forward_hook(lambda _, args, output: seen.append(output))
    model(images)
    masked(model, images)
    main, sub = (features.permute(0, 2, 3, 1) if layout == "NCHW" else features for features in seen)
    side = int((main.numel() / main.shape[0] / main.shape[-1]) ** 0.5)
    main, sub = main.reshape(2, side, side, -1), sub.reshape(2, side, side, -1)
    visible = torch.zeros(2, 4, dtype=torch.bool).scatter_(1, kept_cells(2, 4), True).view(2, 2, 2)  # cells of 32 px
    visible = visible.repeat_interleave(side // 2, 1).repeat_interleave(side // 2, 2).unsqueeze(-1)
    torch.testing.assert_close(sub, torch.where(visible, main, model.mask_token[0, 0]))


def test_each_stream_of_crossvit_loses_half_of_its_patches():
    shape = {"embed_dim": (24, 48), "depth": ((1, 1, 0),), "num_heads": (2, 2), "mlp_ratio": (2.0, 2.0, 1.0)}
    model, seen = CrossVit(img_size=48, img_scale=(1.0, 1.0), patch_size=(8, 16), **shape), []
    augsub.patch(model).pos_drop.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    for name in ("masking", "random_crop"):
        model(torch.randn(2, 3, 48, 48), augsub=name, augsub_ratio=0.5)
    assert seen == [1 + 18, 1 + 4, 1 + 16, 1 + 4]


SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PREFIXES = {"ViT": 1, "DeiT": 2, "Dinov2": 1, "Dinov2WithRegisters": 1 + 4}  # class, distillation, register tokens


class Constant(nn.Module):
    """Embeddings of whatever it is given."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Linear(1, 1)  # Transformers asks for its dtype

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize(("name", "prefix"), PREFIXES.items())
def test_transformers_of_hugging_face_lose_tokens(name, prefix):
    """The last hidden state of the sub-model is that of the blocks on the kept tokens alone."""
    create, config = (getattr(transformers, f"{name}{kind}") for kind in ("ForImageClassification", "Config"))
    model, images = create(config(**SIZE)).eval(), torch.randn(3, 3, 32, 32)
    plain = model(images).logits
    sub = masked(model.base_model, images).last_hidden_state
    assert torch.equal(model(images).logits, plain)
    assert not torch.equal(model(images, augsub="masking", augsub_ratio=0.5).logits, plain)
    assert model(images, augsub="random_crop", augsub_ratio=0.5).logits.shape == plain.shape

    backbone = augsub.unpatch(model.base_model)
    index = torch.cat([torch.arange(prefix).expand(3, prefix), kept_cells(3, 16) + prefix], 1).unsqueeze(-1)
    backbone.embeddings = Constant(backbone.embeddings(images).take_along_dim(index, 1))
    expected = backbone(images).last_hidden_state
    assert sub.shape == (3, prefix + 8, 32)
    torch.testing.assert_close(sub.sort(1).values, expected.sort(1).values, atol=1e-5, rtol=1e-5)
