"""One smallest model per (timm file, class), and variants of other traits: patch, every augmentation, unpatch."""

from __future__ import annotations

import collections
import inspect

import pytest
import timm
import torch
from torch import Tensor, nn

import augsub
from models.zoo import load_rows

NUM_CLASSES = 10
SMALL = 128  # pixels; 4 x 4 cells
# Fewer blocks of the same kind, for models that exist in one large size only
SHALLOW = {"deepseek_vit": 2, "gemma4_vit": 2, "qwen3_vit": 4}
ROWS = {row.smallest: row for row in load_rows()}
VARIANTS = (
    "vit_tiny_patch16_224",  # static size
    "vit_base_patch32_siglip_256",  # no class token, attention pooling
    "vit_small_patch14_reg4_dinov2",  # registers
    "vit_pwee_patch16_reg1_gap_256",  # parallel attention and MLP, mean pooling
    "vit_small_patch16_18x2_224",  # parallel branches
    "vit_base_patch32_clip_224",  # pre-norm
    "vit_small_r26_s32_224",  # convolutional stem
    "flexivit_small",
    "eva02_tiny_patch14_224",  # rotary, absolute and class token
    "vit_small_patch16_rope_224",  # axial rotary
    "vit_small_patch16_rope_mixed_224",  # learned rotary per block
    "vit_pe_core_tiny_patch16_384",  # rotary, attention pooling
    "eva_giant_patch14_224",  # no rotary
    "naflexvit_base_patch16_map",
    "swin_s3_tiny_224",
    "swinv2_cr_tiny_ns_224",
    "mobilevitv2_050",
    "botnet26t_256",  # position-bound attention in a convolutional network
    "maxvit_rmlp_pico_rw_256",  # network of relative positions
)
EXTRA = {"eva_giant_patch14_224": {"depth": 2}, "vit_small_patch16_18x2_224": {"depth": 3}}
BUILT_SIZE = {"csatv2": 256, "halonet_h1": 256, "botnet26t_256": 256}  # as built or of a large stride
SLOW = {"legacy_senet"}


def small_model(name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights none of which is (nearly) zero, and two images that fit it."""
    torch.manual_seed(0)
    file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    arguments = {"num_classes": NUM_CLASSES, **EXTRA.get(name, {})}
    if file in SHALLOW:
        arguments["depth"] = SHALLOW[file]
    size = BUILT_SIZE.get(name, SMALL)
    try:
        model = timm.create_model(name, img_size=size, **arguments)
    except (TypeError, AssertionError, RuntimeError):
        model = timm.create_model(name, **arguments)
        if not augsub.supports(model).get("random_crop") == "image":
            size = model.pretrained_cfg["input_size"][-1]
    if "patch14" in name or file == "deepseek_vit":
        size = 112
        model = timm.create_model(name, img_size=size, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3 and parameter.dtype.is_floating_point:
                nn.init.uniform_(parameter, 0.1, 0.3)  # layer scales, zero-initialised norms, heads and gates
    return model, torch.randn(2, 3, size, size)


def forward(model: nn.Module, images: Tensor, **arguments) -> Tensor:
    torch.manual_seed(1)
    return model(images, **arguments)


def reached(model: nn.Module, output: Tensor) -> set[str]:
    """Names of the parameters that get a gradient from the output."""
    model.zero_grad(set_to_none=True)
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    return found


def check(name: str) -> None:
    model, images = small_model(name)
    keys, kind = list(model.state_dict()), type(model)
    with torch.no_grad():
        plain = forward(model.eval(), images)
        augsub.patch(model)
        assert torch.equal(forward(model, images), plain)
    main = forward(model.train(), images)
    needed = reached(model, main)
    support = augsub.supports(model)
    assert "masking" in support
    for augmentation in support:
        sub = forward(model, images, augsub=augmentation, augsub_ratio=0.5)
        assert sub.shape == main.shape and torch.isfinite(sub).all(), augmentation
        assert (sub - main).abs().max() > 1e-4 * main.std(), f"{augmentation} changes nothing"
        assert needed <= reached(model, sub), augmentation
    assert augsub.unpatch(model) is model and type(model) is kind and list(model.state_dict()) == keys


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ROWS])
def test_smallest_model_of_every_row(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_other_traits(name: str) -> None:
    check(name)
