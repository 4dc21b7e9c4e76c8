"""Checkpoints of other projects in their official layouts, weights resized, where weights lie; what is refused."""

from __future__ import annotations

import logging
import re

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import augsub
from models.build import build_on_meta, create_model
from models.weights import LoadReport, load_weights
from tests.zoo import load_rows

CLASSES = 10
DECODER = {  # of MAE's pretraining
    "mask_token": torch.ones(1, 1, 32),
    "decoder_pos_embed": torch.ones(1, 17, 32),
    "decoder_embed.weight": torch.ones(32, 48),
    "decoder_blocks.0.attn.qkv.weight": torch.ones(96, 32),
    "decoder_norm.weight": torch.ones(32),
}
CLIP_NAMES = {  # timm's, and those of OpenAI and open_clip
    "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre", "blocks": "transformer.resblocks", "norm1": "ln_1", "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "norm.": "ln_post.",
}  # fmt: skip
CLIP_TEXTS = {  # the tower beside that of the images
    "visual.proj": torch.ones(48, 32),
    "positional_embedding": torch.ones(77, 32),
    "transformer.resblocks.0.attn.in_proj_weight": torch.ones(96, 32),
    "ln_final.weight": torch.ones(32),
    "logit_scale": torch.ones(()),
}


def tiny(name: str, **kwargs) -> nn.Module:
    shape = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES, **kwargs}
    model = augsub.patch(create_model(name, image_size=32, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_loaded(model: nn.Module, expected: dict[str, Tensor], initial: set[str], report: LoadReport) -> None:
    assert set(report.initial) == initial and report.unexpected == ()
    for name, tensor in model.state_dict().items():
        assert name in initial or torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("decoder", [{}, DECODER])
def test_mae(decoder):
    """As the authors publish it: the encoder under `model`, in the full version with the decoder."""
    encoder = tiny("vit_base_patch16_224", num_classes=0).state_dict()
    model = tiny("vit_base_patch16_224", global_pool="avg")
    report = load_weights(model, {"model": encoder | decoder}, "mae_pretrain_vit_base.pth")
    assert set(report.pretraining) == {"norm.weight", "norm.bias", *decoder}
    assert_loaded(model, encoder, {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}, report)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["published", "saved in training"])
def test_clip(prefix):
    """An image tower in half precision, its tables without a batch dimension, beside a text tower."""
    model, source = (tiny("vit_base_patch16_clip_224", global_pool="avg", fc_norm=False) for _ in range(2))
    tower = {name: weight.half() for name, weight in source.state_dict().items() if not name.startswith("head")}
    renamed = {"visual." + rename(name): weight for name, weight in tower.items()}
    for name in ("visual.class_embedding", "visual.positional_embedding"):
        renamed[name] = renamed[name].squeeze()
    content = behind(prefix, renamed | CLIP_TEXTS)
    report = load_weights(model, {"epoch": 3, "state_dict": content} if prefix else content, "ViT-B-16.pt")
    assert set(report.pretraining) == CLIP_TEXTS.keys()
    expected = {name: weight.float() for name, weight in tower.items()}
    assert_loaded(model, expected, {"head.weight", "head.bias"}, report)


def rename(name: str) -> str:
    return re.sub("|".join(map(re.escape, CLIP_NAMES)), lambda found: CLIP_NAMES[found[0]], name)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_position_table_is_resized(antialias):
    before, after = (
        create_model("deit3_small_patch16_224", image_size=size, num_classes=CLASSES, depth=1) for size in (192, 224)
    )
    report = load_weights(after, {"model": augsub.patch(before).state_dict()}, "last.pt", antialias=antialias)
    assert report.resized == {"pos_embed": ((1, 144, 384), (1, 196, 384))}
    assert report.initial == report.unexpected == ()
    table = before.pos_embed.reshape(1, 12, 12, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(table, (14, 14), mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close(after.pos_embed, expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_swins_position_biases_are_resized():
    names = ("swin_base_patch4_window7_224", "swin_base_patch4_window12_384")
    before, after = (create_model(name, depths=(1, 1), num_heads=(2, 4), embed_dim=32) for name in names)
    with torch.no_grad():
        for layer in before.layers:  # from -1 to 1 along the rows, which stays what it is
            slope = torch.linspace(-1, 1, 13).repeat_interleave(13)
            layer.blocks[0].attn.relative_position_bias_table.copy_(slope[:, None])
    report = load_weights(after, augsub.patch(before).state_dict(), "last.pt")
    tables = [f"layers.{layer}.blocks.0.attn.relative_position_bias_table" for layer in (0, 1)]
    assert report.resized == {table: ((169, heads), (529, heads)) for table, heads in zip(tables, (2, 4), strict=True)}
    for table in tables:
        rows = after.get_parameter(table).view(23, 23, -1)
        assert (rows[6:17].diff(dim=0) > 0).all() and rows.amin() < -0.9 and rows.amax() > 0.9


def tiny_vit(**kwargs) -> nn.Module:
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 2, **kwargs}
    return create_model("vit_tiny_patch16_224", num_classes=CLASSES, image_size=32, **shape)


def weights_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in tiny_vit().state_dict().items()}


def behind(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in weights.items()}


OWN, OTHER = weights_of(0), weights_of(1)
HEAD = {f"projector.{layer}.weight": torch.ones(3, 3) for layer in range(12)}
AVERAGES = {"state_dict_ema": OWN}, {"model_ema": behind("module.", OWN)}, {"ema": {"module": OWN, "decay": 0.9}}
CONTENTS = [  # where the weights lie
    behind("model.", OWN) | behind("teacher.", OTHER),
    behind("model_ema.module.", OTHER) | behind("net.", OWN),
    behind("backbone.", OWN) | HEAD,  # a large head
    {"state_dict": behind("model.", OWN) | HEAD, "epoch": 3},
    {"state_dict": behind("base.", OWN) | behind("momentum_encoder.", OTHER)},
    {"teacher": behind("backbone.", OTHER), "student": behind("module.backbone.", OWN) | HEAD},
    {"my_network": {"weights": OWN}, "optimizer": {"state": {0: {"step": torch.ones(3)}}}},
    {"state_dict": {"model": behind("module.", OWN)}, "epoch": 3},
    {"state_dict": OWN, "state_dict_ema": OTHER},  # timm's
    {"model_ema": OTHER, "model": OWN},
    behind("module.", OWN) | {"n_averaged": torch.tensor(3), "arch": "vit"},  # averaged by torch
    {name.replace("blocks.1.", "blocks.1._orig_mod."): weight for name, weight in OWN.items()},
    {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): weight for name, weight in OWN.items()},
    behind("_fsdp_wrapped_module._orig_mod.", OWN),
    *(
        behind(wrappers, OWN) | {"criterion.weight": torch.ones(10)}
        for wrappers in (
            "",
            "model._orig_mod.",
            "_orig_mod.module.",
            "module.model.",
            "timm_model.",
            "student.backbone.",
        )
    ),
    *AVERAGES,
]


@pytest.mark.parametrize("content", CONTENTS)
def test_the_trained_weights_are_found_and_an_average_alone_is_said_to_be_one(content, caplog):
    caplog.set_level("WARNING", "models")
    model = tiny_vit()
    report = load_weights(model, content, "file", complete=True)
    assert all(torch.equal(weight, OWN[name]) for name, weight in model.state_dict().items())
    assert report.initial == () and set(report.loaded) == OWN.keys()
    assert ("holds no trained weights, only their average" in caplog.text) == any(
        content is average for average in AVERAGES
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (behind("model.", OWN) | behind("teacher.", OTHER), "file: these are 'model', not 'teacher'"),
        ({"state_dict": OWN, "state_dict_ema": OTHER}, "file: these are 'state_dict', not 'state_dict_ema'"),
        ({"teacher": behind("backbone.", OTHER)}, "no trained weights, only their average, 'teacher.backbone'"),
    ],
)
def test_what_was_chosen_is_named(content, message, caplog):
    caplog.set_level(logging.INFO, "models")
    report = load_weights(tiny_vit(), content | {"criterion.weight": torch.ones(2)}, "file")
    beside = [name for name in content if not name.startswith("model.") and isinstance(content[name], Tensor)]
    assert set(report.unexpected) == ({"criterion.weight", *beside} if beside else set())
    assert message in caplog.text


def test_a_swin_of_ours_brings_its_mask_token(make_model):
    source, model, plain = (augsub.patch(make_model("swin")) for _ in range(3))
    report = load_weights(model, {"model": source.state_dict(), "iteration": 3}, "last.pt")
    assert report.initial == report.unexpected == ()
    assert torch.equal(model.mask_token, source.mask_token)
    token = plain.mask_token.detach().clone()
    assert load_weights(plain, make_model("swin").state_dict(), "timm.pth", complete=True).initial == ()
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


def test_a_head_for_other_classes_stays_new_and_is_named(caplog):
    model, other = tiny_vit(), OWN | {"head.weight": torch.ones(7, 24), "head.bias": torch.ones(7)}
    head = model.head.weight.detach().clone()
    with caplog.at_level(logging.INFO):
        load_weights(model, other, "other.pth").log("other.pth")
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[0].attn.qkv.weight, OWN["blocks.0.attn.qkv.weight"])
    assert "the head is new, the checkpoint's is for other classes: head.bias, head.weight" in caplog.text


def without(*names: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in OWN.items() if name not in names}


@pytest.mark.parametrize(
    ("content", "message", "complete"),
    [
        (lambda: timm.create_model("resnet18").state_dict(), r"fills 0 of 32 .* 122 unknown ones \(bn1.bias, ", False),
        (lambda: tiny_vit(mlp_ratio=2.0).state_dict(), r"fills 26 of 32 .*blocks.0.mlp.fc1.bias is \(48,\)", False),
        (lambda: tiny_vit(depth=3).state_dict(), r"fills 32 of 32 tensors and has 12 unknown ones", False),
        (
            lambda: {"state_dict": behind("module.encoder.", tiny_vit(depth=3).state_dict()) | HEAD},
            r"of another model: it fills 32 of 32 tensors and has 12 unknown ones",
            False,
        ),
        (lambda: {"model": {"epoch": 3}}, r"weights.pth holds no state dict", False),
        (lambda: {}, r"weights.pth holds no state dict", False),
        (lambda: dict(list(OWN.items())[:3]), r"fills 3 of 32 tensors and has 0 unknown ones", False),
        (lambda: OWN | {"head.bias": torch.ones(7)}, "weights.pth is for 7 classes, the data have 10", True),
        (lambda: without("norm.bias"), "leaves 1 tensors of the model as they are initialised, norm.bias", True),
    ],
)
def test_what_is_no_checkpoint_of_this_model_or_not_all_of_it(content, message, complete):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, content(), "weights.pth", complete=complete)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("levit_128s", alien) for alien in ("test_resnet", "test_convnext", "beit_base_patch16_224")),
        *(("coat_tiny", "test_resnet"), ("swin_tiny_patch4_window7_224", "beit_base_patch16_224")),
        *(("hiera_tiny_224", "test_convnext"), ("resnet18", "resnet34"), ("resnet34", "resnet18")),
    ],
)
def test_weights_of_another_class_or_depth_are_refused(name, other):
    with pytest.raises(ValueError, match=r"checkpoint alien.pth is of another model: "):
        load_weights(build_on_meta(name), build_on_meta(other).state_dict(), "alien.pth")


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in load_rows() if row.params < 120], ids=lambda row: row.smallest)
def test_every_class_of_timm_takes_its_own_weights_back(row):
    """timm's conversions of other layouts must leave checkpoints of ours as they are."""
    source, model = (augsub.patch(timm.create_model(row.smallest)) for _ in range(2))
    report = load_weights(model, {"model": source.state_dict()}, "last.pt")
    assert report.initial == report.unexpected == () and not report.resized
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())
