"""Where augmentations act in families of other kinds, against independent computations."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.crossvit import CrossVit
from timm.models.davit import DaVit
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

import augsub
from augsub.families import FAMILIES, Family, register_family
from augsub.families.stem import StemFamily

ROTARY = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_classes": 10,
}


def kept_cells(seed: int, batch: int, cells: int, kept: int) -> list[set[int]]:
    """Cells of lowest noise per sample, from one draw (batch, cells)."""
    torch.manual_seed(seed)
    return [set(noise.argsort()[:kept].tolist()) for noise in torch.rand(batch, cells)]


def test_support_is_data_and_leaves_the_model_alone(make_model, family_model):
    assert augsub.supports(make_model("vit")) == {
        "drop_path": "drop_path",
        "dropout": "dropout",
        "masking": "tokens",
        "random_crop": "tokens",
    }
    assert augsub.supports(make_model("resnet")) == {
        "drop_path": "drop_path",
        "masking": "image",
        "random_crop": "image",
    }
    keys, kind = list(family_model.state_dict()), type(family_model)
    support = augsub.supports(family_model)
    assert type(family_model) is kind and list(family_model.state_dict()) == keys
    assert augsub.supports(augsub.patch(family_model)) == support


def test_rotary_embeddings_go_with_their_tokens():
    images = torch.randn(3, 3, 64, 64)
    torch.manual_seed(0)
    model = Eva(**ROTARY).eval()
    tokens, rotary = model._pos_embed(model.patch_embed(images))
    expected = []
    for sample, kept in enumerate(kept_cells(5, 3, 16, 8)):
        kept = sorted(kept)
        x = torch.cat([tokens[sample : sample + 1, :1], tokens[sample : sample + 1, 1:][:, kept]], dim=1)
        for block in model.blocks:
            x = block(x, rope=rotary[kept])
        expected.append(model.forward_head(model.norm(x)))
    torch.manual_seed(5)
    logits = augsub.patch(model)(images, augsub="masking", augsub_ratio=0.5)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
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
    torch.manual_seed(0)
    model = Hiera(img_size=(128, 128), embed_dim=24, num_heads=1, stages=(1, 1, 2, 1), num_classes=10).eval()
    keep = torch.zeros(2, 16, dtype=torch.bool)
    for sample, kept in enumerate(kept_cells(5, 2, 16, 8)):
        keep[sample, list(kept)] = True
    expected = model.forward_head(model.forward_features(images, mask=keep))
    torch.manual_seed(5)
    logits = augsub.patch(model)(images, augsub="masking", augsub_ratio=0.5)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


STEMS = {
    "NLC": lambda: Beit(img_size=64, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=10),
    "NHWC": lambda: VisionTransformerSAM(img_size=64, patch_size=16, embed_dim=24, depth=1, num_heads=2),
    "NCHW": lambda: DaVit(depths=(1, 1), embed_dims=(24, 32), num_heads=(2, 2), num_classes=10),
}


@pytest.mark.parametrize("layout", STEMS)
def test_stem_features_become_the_mask_token_where_a_cell_is_hidden(layout):
    torch.manual_seed(0)
    model = augsub.patch(STEMS[layout]()).eval()
    stem = model.stem if layout == "NCHW" else model.patch_embed
    seen = []
    stem.register_forward_hook(lambda _, args, output: seen.append(output))
    images = torch.randn(2, 3, 64, 64)
    model(images)
    torch.manual_seed(5)
    model(images, augsub="masking", augsub_ratio=0.5)
    main, sub = (features.permute(0, 2, 3, 1) if layout == "NCHW" else features for features in seen)
    side = int((main.numel() / main.shape[0] / main.shape[-1]) ** 0.5)
    main, sub = main.reshape(2, side, side, -1), sub.reshape(2, side, side, -1)
    for sample, kept in enumerate(kept_cells(5, 2, 4, 2)):  # 2 x 2 cells of 32 pixels
        for row in range(side):
            for column in range(side):
                cell = row * 2 // side * 2 + column * 2 // side
                expected = main[sample, row, column] if cell in kept else model.mask_token[0, 0]
                torch.testing.assert_close(sub[sample, row, column], expected)


def test_each_stream_of_crossvit_loses_half_of_its_patches():
    model = CrossVit(
        img_size=48,
        img_scale=(1.0, 1.0),
        patch_size=(8, 16),
        embed_dim=(24, 48),
        depth=((1, 1, 0),),
        num_heads=(2, 2),
        mlp_ratio=(2.0, 2.0, 1.0),
        num_classes=10,
    )
    seen = []
    augsub.patch(model).pos_drop.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    model(torch.randn(2, 3, 48, 48), augsub="masking", augsub_ratio=0.5)
    assert seen == [1 + 18, 1 + 4]
    model(torch.randn(2, 3, 48, 48), augsub="random_crop", augsub_ratio=0.5)
    assert seen[2:] == [1 + 16, 1 + 4]


def test_a_family_of_ones_own(monkeypatch):
    class MapModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 8, 8)
            self.head = nn.Linear(8, 10)

        def forward(self, images):
            return self.head(self.embed(images).mean((2, 3)))

    name = f"{MapModel.__module__}.{MapModel.__qualname__}"
    monkeypatch.setitem(FAMILIES, name, Family())  # gone after the test
    register_family(StemFamily("embed", "NCHW"), name)
    model = augsub.patch(MapModel())
    assert augsub.supports(model) == {"masking": "stem", "random_crop": "image"}
    model(torch.randn(2, 3, 64, 64), augsub="masking", augsub_ratio=0.5).sum().backward()
    assert model.mask_token.grad is not None


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "test_resnet"])
def test_features_of_the_unpatched_class_are_timms_own(name):
    classifier = augsub.patch(timm.create_model(name))
    features = timm.create_model(name, features_only=True)
    assert not any(augsub.is_patched(module) for module in features.modules())
    size = classifier.pretrained_cfg["input_size"][-1]
    assert all(isinstance(level, torch.Tensor) for level in features(torch.randn(1, 3, size, size)))
