"""Costs against the papers, fvcore, torch's own counter and arithmetic by hand. One FLOP is one multiply-add."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import augsub
from models.build import build_on_meta, checkpoint_gradients, create_model
from models.complexity import activation_memory, analyze, analyze_objective, count_forward, count_with_torch
from tests.zoo import load_rows
from tools.analysis import PUBLISHED

with warnings.catch_warnings():  # fvcore compiles a function with torch.jit.script, which is deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

IMAGENET, SMALL = (3, 224, 224), (3, 32, 32)
# Operations that are not counted: none of them multiplies matrices
ELEMENTWISE = {
    *("add", "add_", "addcmul", "clamp", "clamp_min", "cos", "cumsum", "div", "div_", "exp", "mul", "mul_", "neg"),
    *("pow", "rsqrt", "rsub", "sin", "sub", "ceil", "linalg_vector_norm", "mean", "sum", "amax", "max", "_softmax"),
    *("gelu", "hardsigmoid", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "leaky_relu_", "sigmoid", "silu"),
    *("silu_", "relu", "relu_", "tanh", "max_pool2d_with_indices", "avg_pool2d", "floor", "remainder", "outer"),
}


@pytest.mark.parametrize("title", PUBLISHED)
def test_the_literature_within_one_percent(title):
    name, mega_params, giga_flops = PUBLISHED[title]
    model = build_on_meta(name, num_classes=1000)
    complexity = analyze(model, IMAGENET)
    assert complexity.params == sum(parameter.numel() for parameter in model.parameters())
    assert complexity.params == pytest.approx(mega_params * 1e6, rel=0.01)
    assert complexity.main.flops == pytest.approx(giga_flops * 1e9, rel=0.01)
    assert complexity.main.flops == pytest.approx(count_with_torch(model, IMAGENET), rel=0.01)


def by_fvcore(model, images) -> tuple[float, float]:
    """FLOPs and activations, attention left out, as fvcore's trace of a forward counts them."""
    analyses = FlopCountAnalysis(model, images), ActivationCountAnalysis(model, images)
    return tuple(
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none").total()
        for analysis in analyses
    )


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_resnet", "resnet10t"])
def test_it_counts_what_fvcore_counts(name):
    model = create_model(name, image_size=None).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # which fvcore does not know
    flops, activations = by_fvcore(model, torch.zeros(1, 3, 160, 160))
    counted = count_forward(model, (1, 3, 160, 160))
    assert (counted.flops, counted.activations) == (flops, activations)


@pytest.mark.parametrize(("affine", "per_value"), [(True, 5), (False, 4)])
def test_a_norm_costs_what_fvcore_says(affine, per_value):
    norm = nn.LayerNorm(SMALL, elementwise_affine=affine).eval()
    assert (
        count_forward(norm, (1, *SMALL)).flops == per_value * 3 * 32 * 32 == by_fvcore(norm, torch.zeros(1, *SMALL))[0]
    )


@pytest.mark.parametrize(
    ("name", "augmentation", "limit"),
    [
        ("vit_base_patch16_224", "masking", 0.51),
        ("swin_base_patch4_window7_224", "random_crop", 0.60),
        ("resnet50", "random_crop", 0.55),
    ],
)
def test_sub_models_that_see_half_cost_half(name, augmentation, limit):
    model = build_on_meta(name)
    complexity = analyze(model, IMAGENET, [augsub.build(augmentation, ratio=0.5)])
    assert 0.4 < complexity.sub_flops / complexity.main.flops <= limit
    assert not augsub.is_patched(model)


def test_training_cost_counts_every_sub_model(make_model):
    model = make_model("vit")
    masking, drop_path = augsub.build("masking", ratio=0.5), augsub.build("drop_path", ratio=0.5)
    half, whole, both = (analyze(model, SMALL, subs) for subs in ([masking], [drop_path], [masking, drop_path]))
    assert whole.training_cost == 2
    assert both.training_cost == pytest.approx(half.training_cost + 1)
    assert both.as_dict() == {
        "params": both.params,
        "main_flops": both.main.flops,
        "sub_flops": half.sub_flops + both.main.flops,
        "training_cost": both.training_cost,
        "activations": both.main.activations,
    }


def test_costs_follow_all_arguments_shares_and_teachers(make_model):
    def cost(*sub_models: augsub.SubModel):
        objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), sub_models, main_weight=0)
        teacher = augsub.patch(make_model("vit"))
        return analyze_objective(make_model("vit"), SMALL, objective, epochs=4, teacher=teacher)

    kinds = {"ratio": 0.0}, {"ratio": 0.5}, {"ratio": 0.5, "share": 0.5}, {"ratio": augsub.Ramp(0.0, 0.5, 4)}
    whole, half, shared, ramped = cost(*(augsub.SubModel("masking", **kind) for kind in kinds)).subs
    assert shared.flops == pytest.approx(half.flops / 2, rel=1e-5)
    assert ramped.flops == pytest.approx((whole.flops + half.flops) / 2, rel=0.05)
    of_teacher = {
        name: cost(augsub.SubModel("masking", share=0.5, learn_from=name)).taught / whole.flops
        for name in ("labels", "ema", "teacher", "augmented_teacher")
    }
    masked = half.flops / whole.flops / 2
    expected = {"labels": 0, "ema": 0.5, "teacher": 0.5, "augmented_teacher": masked}
    assert of_teacher == pytest.approx(expected, rel=1e-4)
    paths = {"name": "drop_path", "ratio": 0.5}
    computed, skipped = cost(augsub.SubModel(paths), augsub.SubModel({**paths, "mode": "skip"})).subs
    assert skipped.flops < 0.6 * computed.flops


def test_a_model_stays_plain_and_its_mask_token_is_no_parameter(make_model):
    swin = make_model("swin")
    params = sum(parameter.numel() for parameter in swin.parameters())
    assert analyze(swin, SMALL, [augsub.build({"name": "masking", "ratio": 0.5, "cell": 8})]).params == params
    with pytest.raises(ValueError, match="48 x 48 pixels do not fit: Input height"):
        analyze(swin, (3, 48, 48))
    assert not augsub.is_patched(swin)


@pytest.mark.slow
@pytest.mark.parametrize("row", load_rows(), ids=lambda row: row.smallest)
def test_no_matrix_product_of_any_timm_class_is_left_out(row):
    model = build_on_meta(row.smallest).eval()
    shape = model.pretrained_cfg["input_size"]
    counted = count_forward(model, (1, *shape))
    assert set(counted.uncounted) <= ELEMENTWISE
    assert counted.flops >= 0.999 * count_with_torch(model, shape)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


KEY, VALUES = (torch.zeros(2, 3, 7, size, device="meta") for size in (4, 6))  # (B, heads, S, E or F)
LSTM_WEIGHTS = 2 * (4 * 3 * (4 + 3) + 4 * 3 * (2 * 3 + 3))  # directions, four gates; layer 2 sees both directions


@pytest.mark.parametrize(
    ("module", "shape", "flops", "activations", "uncounted"),
    [
        (
            Function(lambda query: functional.scaled_dot_product_attention(query, KEY, VALUES)),
            (2, 3, 5, 4),
            2 * 3 * (5 * 7 * 4 + 5 * 7 * 6),
            2 * 3 * 5 * 6,
            {},
        ),
        (nn.Conv2d(6, 6, 3, groups=6, padding="same"), (2, 6, 8, 8), 2 * 6 * 9 * 8 * 8, 2 * 6 * 8 * 8, {}),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 8, 8), 2 * 6 * 4 * 4 * 8 * 8, 2 * 4 * 16 * 16, {}),
        (nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True), (2, 5, 4), 2 * 5 * LSTM_WEIGHTS, 2 * 5 * 6, {}),
        (nn.Unfold(2, stride=2), (1, 3, 8, 8), 0, 0, {}),
        (nn.Fold(8, 2, stride=2), (1, 12, 16), 12 * 16, 0, {}),
        (nn.Upsample((6, 6), mode="nearest"), (1, 2, 4, 4), 2 * 36, 0, {}),
        (nn.Upsample((6, 6), mode="bilinear"), (1, 2, 4, 4), 2 * 36 * 4, 0, {}),
        (nn.Upsample((6, 6), mode="bicubic"), (1, 2, 4, 4), 2 * 36 * 16, 0, {}),
        (Function(lambda x: torch.cumprod(x * x, 1)), (2, 4), 0, 0, {"mul": 1, "cumprod": 1}),
    ],
)
def test_single_operations(module, shape, flops, activations, uncounted):
    counted = count_forward(module.eval(), shape)
    assert (counted.flops, counted.activations, counted.uncounted) == (flops, activations, uncounted)


def test_a_vit_and_its_sub_model_by_hand(make_model):
    """48 wide, 3 blocks, patches of 8 on 32 px; a block of N tokens: linear layers, attention, two norms."""

    def expected(tokens: int) -> int:
        block = tokens * (4 + 8) * 48**2 + 2 * tokens**2 * 48 + 2 * 5 * tokens * 48
        return 16 * 3 * 64 * 48 + 3 * block + 5 * tokens * 48 + 48 * 10

    model, shape = augsub.patch(make_model("vit")).eval(), (1, *SMALL)
    assert count_forward(model, shape).flops == expected(1 + 16)
    assert count_forward(model, shape, augsub.build("masking", ratio=0.5)).flops == expected(1 + 8)


def held_after_forward(model, images, augmentation, autocast) -> int:
    """Bytes allocated and not freed while the graph is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, autocast():
        logits = model(images, augsub=augmentation)
    assert logits.grad_fn is not None
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages()) + images.nbytes


@pytest.mark.parametrize("autocast", [nullcontext, partial(torch.autocast, "cpu", dtype=torch.bfloat16)])
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_memory_of_activations_is_what_a_forward_leaves(patched_model, ratio, autocast):
    cell = None if hasattr(patched_model, "cls_token") else 16  # px
    augmentation = None if ratio is None else augsub.build("masking", ratio=ratio, cell=cell)
    patched_model.train()(torch.randn(2, *SMALL))  # what is made at the first forward
    estimate = activation_memory(patched_model, SMALL, 16, augmentation, autocast)
    measured = held_after_forward(patched_model, torch.randn(16, *SMALL), augmentation, autocast)
    assert estimate == pytest.approx(measured, rel=0.01)


def test_weights_are_no_activations_masked_patches_and_checkpointed_blocks_have_none(make_model):
    model = augsub.patch(make_model("vit"))
    whole, many = (activation_memory(model, SMALL, images) for images in (1, 10))
    assert many == 10 * whole
    masked = activation_memory(model, SMALL, 1, augsub.build("masking", ratio=0.5))
    assert 0.5 < masked / whole < 0.7  # 8 of 16 patches and the class token; the patch embedding whole
    checkpoint_gradients(model)
    assert activation_memory(model, SMALL, 1) < whole / 3
