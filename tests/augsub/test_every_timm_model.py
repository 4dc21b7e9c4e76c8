"""One smallest model per (timm file, class), and variants of other traits: patch, every augmentation, unpatch.

All of them on meta tensors, which have shapes alone, and with numbers one of each mechanism; all with numbers: slow.
"""

from __future__ import annotations

import importlib

import pytest
import timm
import torch
from torch import Tensor, nn

import augsub
from augsub.families import FAMILIES
from tests.skipping import can_skip, skipped_and_computed
from tests.zoo import PAGE, load_rows, print_table

NUM_CLASSES = 10
SMALL = 128  # pixels; 4 x 4 cells
# Fewer blocks of the same kind, for models that exist in one large size only
SHALLOW = {"deepseek_vit": 2, "gemma4_vit": 2, "qwen3_vit": 4}
ROWS = {row.smallest: row for row in load_rows()}
# Static size, attention pooling, registers, parallel branches, pre-norm, convolutional stem, rotary of all kinds …
VARIANTS = (
    "vit_tiny_patch16_224", "vit_base_patch32_siglip_256", "vit_small_patch14_reg4_dinov2", "flexivit_small",
    "vit_pwee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224", "vit_base_patch32_clip_224", "vit_small_r26_s32_224",
    "eva02_tiny_patch14_224", "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224", "eva_giant_patch14_224",
    "vit_pe_core_tiny_patch16_384", "naflexvit_base_patch16_map", "test_efficientnet_ln", "swin_s3_tiny_224",
    "swinv2_cr_tiny_ns_224", "mobilevitv2_050", "botnet26t_256", "maxvit_rmlp_pico_rw_256",
    # blocks with skipped paths that no smallest model has
    "vit_base_patch16_rpn_224", "vit_relpos_small_patch16_rpn_224", "tf_efficientnetv2_b1", "cspresnext50",
    "cs3edgenet_x", "fastvit_mci0", "coatnext_nano_rw_224", "gmixer_12_224", "resmlp_12_224", "regnetv_040",
    "xception41", "coat_lite_tiny", "maxvit_tiny_pm_256", "test_maxvit", "mobilenet_edgetpu_100", "mnasnet_small",
    "eva02_enormous_patch14_clip_224", "resnetv2_50", "skresnet50", "mobilenetv4_conv_small_035",
)  # fmt: skip
# Norms over the channels of a position: of a zeroed cell they made gradients of 1e5 to 1e24 times the main model's
EXPLODED_WITH_ZERO_PIXELS = ("convnext_tiny", "convnext_atto", "convnextv2_atto", "caformer_s18", "mambaout_femto")
ONE_PER_MECHANISM = (
    # tokens: timm's own slot, class token later, rotary, two streams, units, with their grid, with their positions
    "test_vit", "cait_xxs24_224", "eva02_tiny_patch14_224", "crossvit_tiny_240", "hiera_tiny_224",
    "naflexvit_base_patch16_map", "gemma4_vit_167m",
    # mask token: in a sequence, in maps of both layouts, with norms of each position, behind several convolutions
    "xcit_nano_12_p8_224", "pvt_v2_b0", "test_convnext", "test_efficientnet_ln", "csatv2",
    # built size only, windows of smaller images, pixels, residual connections with a rate of their own, or without one
    "levit_128s", "swinv2_cr_tiny_ns_224", "test_resnet", "efficientvit_m0", "mobilevitv2_050",
)  # fmt: skip
EXTRA = {
    "eva_giant_patch14_224": {"depth": 2},
    "eva02_enormous_patch14_clip_224": {"depth": 2},
    "naflexvit_base_patch16_map": {"depth": 2},
    "vit_small_patch16_18x2_224": {"depth": 3},
}
SIZE = {
    "csatv2": 256,  # stride 64
    "halonet_h1": 256,
    "botnet26t_256": 256,
    "efficientformer_l1": 224,
    "crossvit_tiny_240": 120,  # its streams see 120 and 112 pixels, patches of 12 and 16
    "gemma4_vit_167m_enc": 144,  # pools 3 x 3 patches of 16
    "inception_v3": 224,  # a crop of 96 pixels leaves one position to the last norms
}  # where 128 pixels do not fit


def small_model(name: str) -> tuple[nn.Module, int]:
    """The model as timm initialises it, and the side of images that fit it, small ones where any do."""
    torch.manual_seed(0)
    file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    arguments = {"num_classes": NUM_CLASSES, **EXTRA.get(name, {})}
    if file in SHALLOW:
        arguments["depth"] = SHALLOW[file]
    size = SIZE.get(name, SMALL)
    try:
        model = timm.create_model(name, img_size=size, **arguments)
    except (TypeError, AssertionError, RuntimeError):
        model = timm.create_model(name, **arguments)
        if augsub.supports(model).get("random_crop") != "image":
            size = model.pretrained_cfg["input_size"][-1]
    if "patch14" in name or file == "deepseek_vit":
        size = 112
        model = timm.create_model(name, img_size=size, **arguments)
    return model, size


def fill_zeros(model: nn.Module) -> None:
    """Let everything that starts at (nearly) zero act: layer scales, norms, heads and gates."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3 and parameter.dtype.is_floating_point:
                nn.init.uniform_(parameter, 0.1, 0.3)


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
    """Everything that must hold for one model."""
    model, size = small_model(name)
    fill_zeros(model)
    images = torch.randn(2, 3, size, size)
    keys, kind = list(model.state_dict()), type(model)
    with torch.no_grad():
        plain = forward(model.eval(), images)
        augsub.patch(model)
        assert torch.equal(forward(model, images), plain)
    main = forward(model.train(), images)
    needed = reached(model, main)
    support = augsub.supports(model)
    for augmentation, site in support.items():
        sub = forward(model, images, augsub=augmentation, augsub_ratio=0.5)
        assert sub.shape == main.shape and torch.isfinite(sub).all(), augmentation
        assert (sub - main).abs().max() > 1e-4 * main.std(), f"{augmentation} changes nothing"
        learns = {"mask_token"} if (augmentation, site) == ("masking", "stem") else set()
        assert needed | learns <= reached(model, sub), augmentation
    if can_skip(model):
        with torch.no_grad():
            skipped, computed = skipped_and_computed(model.eval(), torch.randn(4, 3, size, size), rate=0.5)
            main = model(torch.randn(4, 3, size, size))
        torch.testing.assert_close(skipped, computed, rtol=1e-3, atol=1e-4 * float((computed - main).abs().max()))
    assert augsub.unpatch(model) is model and type(model) is kind and list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_every_row_has_the_sites_of_the_page_and_keeps_its_shapes(name: str) -> None:
    with torch.device("meta"):
        model, size = small_model(name)
        images, kind, keys = torch.empty(2, 3, size, size), type(model), list(model.state_dict())
        shape = model.train()(images).shape
        support = augsub.supports(augsub.patch(model))
        assert support == {augmentation: site for augmentation, site in ROWS[name].sites.items() if site != "-"}
        for augmentation in support:
            assert model(images, augsub=augmentation, augsub_ratio=0.5).shape == shape, augmentation
        assert can_skip(model) == ROWS[name].skips
    assert augsub.unpatch(model) is model and type(model) is kind and list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ONE_PER_MECHANISM)
def test_one_model_of_every_mechanism(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*ROWS, *VARIANTS} - {*ONE_PER_MECHANISM}))
def test_every_row_and_variant(name: str) -> None:
    check(name)


class Pooled(nn.Sequential):
    """Logits (B, K) of a classifier; of an encoder the mean of its tokens (B, L, D) or its map (B, D, H, W)."""

    def forward(self, images: Tensor, **arguments) -> Tensor:
        output = self[0](images, **arguments)
        return output.flatten(2).mean(2) if output.ndim == 4 else output.mean(1) if output.ndim == 3 else output


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor, names: list[str]) -> list[float]:
    """The gradient's norm in the main model, then in the sub-model under each augmentation at ratio 0.5.

    A class token is left out: timm starts it at 1e-6, and without a position the first norm that it meets, where the
    branch before was dropped, multiplies its gradient by 1e3. The main model's own stochastic depth does the same.
    """
    norms = []
    learning = [parameter for name, parameter in model.named_parameters() if not name.endswith("cls_token")]

    def backward(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad.double() for parameter in learning if parameter.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    sub_models = [augsub.SubModel(name, ratio=0.5, weight=1.0) for name in names]
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), sub_models, main_weight=1.0)
    objective.backward(model, images, labels, backward=backward)
    return norms


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROWS, *VARIANTS, *EXPLODED_WITH_ZERO_PIXELS])
def test_no_sub_model_drowns_the_main_model(name: str) -> None:
    """At the start and after a few steps: a sub-model's target is close, so its gradient should be the smaller one."""
    bare_model, size = small_model(name)
    support = augsub.supports(bare_model)
    model = Pooled(augsub.patch(bare_model)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # as in a warmup
    shares = []
    for _ in range(4):
        images, labels = torch.randn(4, 3, size, size), torch.randint(NUM_CLASSES, (4,))
        main, *subs = gradient_norms(model, images, labels, list(support))
        shares.append(max((norm / main for norm in subs), default=0))
        gradient_norms(model, images, labels, [])
        optimizer.step()
    assert max(shares) <= 10, (support, shares)


def test_every_family_serves_classes_that_timm_has() -> None:
    for name in FAMILIES:
        if name.startswith("transformers."):
            continue  # Hugging Face's
        file, _, model_class = name.partition(".")
        assert hasattr(importlib.import_module(f"timm.models.{file}"), model_class), name


@pytest.mark.slow
def test_the_page_is_that_of_the_installed_timm(capsys) -> None:
    print_table()
    assert capsys.readouterr().out.strip() in PAGE.read_text()
