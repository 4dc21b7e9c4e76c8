"""Costs against the papers, fvcore, torch's own counter and arithmetic by hand. One FLOP is one multiply-add."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import augsub
from models.build import build_on_meta, create_model
from models.complexity import analyze, count_forward, count_with_torch
from tests.zoo import load_rows
from tools.analysis import PUBLISHED

with warnings.catch_warnings():  # fvcore compiles a function with torch.jit.script, which is deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

IMAGENET = (3, 224, 224)
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
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masking, drop_path = augsub.build("masking", ratio=0.5), augsub.build("drop_path", ratio=0.5)
    complexity = analyze(model, (3, 32, 32), [masking, drop_path])
    half, whole = (analyze(model, (3, 32, 32), [augmentation]) for augmentation in (masking, drop_path))
    assert whole.training_cost == 2
    assert complexity.training_cost == pytest.approx(half.training_cost + 1)
    assert complexity.as_dict() == {
        "params": complexity.params,
        "main_flops": complexity.main.flops,
        "sub_flops": half.sub_flops + complexity.main.flops,
        "training_cost": complexity.training_cost,
        "activations": complexity.main.activations,
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mask_token_is_no_parameter_of_the_model(make_model):
    swin = make_model("swin")
    params = sum(parameter.numel() for parameter in swin.parameters())
    assert analyze(swin, (3, 32, 32), [augsub.build({"name": "masking", "ratio": 0.5, "cell": 8})]).params == params


def test_what_does_not_fit_is_refused_and_the_model_stays_plain(make_model):
    model = make_model("vit")
    with pytest.raises(ValueError, match="48 x 48 pixels do not fit: Input height"):
        analyze(model, (3, 48, 48))
    with pytest.raises(ValueError, match="leaves none of 16 cells"):
        analyze(model, (3, 32, 32), [augsub.build("masking", ratio=0.99)])
    assert not augsub.is_patched(model)


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
        self.function = function

    def forward(self, x):
        return self.function(x)


def cost(module, *shape):
    return count_forward(module.eval(), shape)


def test_attention():
    key, values = (torch.zeros(2, 3, 7, size, device="meta") for size in (4, 6))  # (B, heads, S, E or F)
    counted = cost(Function(lambda query: functional.scaled_dot_product_attention(query, key, values)), 2, 3, 5, 4)
    assert counted.flops == 2 * 3 * (5 * 7 * 4 + 5 * 7 * 6)
    assert counted.activations == 2 * 3 * 5 * 6


def test_convolutions():
    counted = cost(nn.Conv2d(6, 6, 3, groups=6, padding="same"), 2, 6, 8, 8)
    assert counted.flops == 2 * 6 * 9 * 8 * 8
    assert counted.activations == 2 * 6 * 8 * 8
    assert cost(nn.ConvTranspose2d(6, 4, 2, stride=2), 2, 6, 8, 8).flops == 2 * 6 * 4 * 4 * 8 * 8


def test_lstm_of_two_layers_and_directions():
    lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
    counted = cost(lstm, 2, 5, 4)
    first, second = 4 * 3 * (4 + 3), 4 * 3 * (2 * 3 + 3)  # four gates; the second layer sees both directions
    assert counted.flops == 2 * 5 * 2 * (first + second)
    assert counted.activations == 2 * 5 * 6


def test_unfold_fold_and_resizing():
    unfolded = cost(nn.Unfold(2, stride=2), 1, 3, 8, 8)
    assert unfolded.flops == 0 and unfolded.uncounted == {}
    assert cost(nn.Fold(8, 2, stride=2), 1, 12, 16).flops == 12 * 16
    for mode, neighbours in (("nearest", 1), ("bilinear", 4), ("bicubic", 16)):
        resized = Function(lambda x, mode=mode: functional.interpolate(x, (6, 6), mode=mode))
        assert cost(resized, 1, 2, 4, 4).flops == 2 * 36 * neighbours


def test_what_is_not_counted_is_named():
    counted = cost(nn.Sequential(nn.Linear(4, 4), Function(lambda x: torch.cumprod(x * x, 1))), 2, 4)
    assert counted.flops == 2 * 4 * 4
    assert counted.uncounted == {"mul": 1, "cumprod": 1}


def test_modules_of_main_model_and_sub_model_have_the_same_names(make_model):
    model = augsub.patch(make_model("vit")).eval()
    shape = (1, 3, 32, 32)
    main, sub = count_forward(model, shape), count_forward(model, shape, augsub.build("masking", ratio=0.5))
    assert main.flops_by_module.keys() == sub.flops_by_module.keys()
    assert main.flops_by_module[""] == main.flops
    assert main.flops_by_module["patch_embed"] == sub.flops_by_module["patch_embed"]
    # linear layers of a block: 4 D^2 in attention, 8 D^2 in the MLP; class token and 16 or 8 patches
    assert main.flops_by_module["blocks.0.mlp"] == 17 * 8 * 48**2
    assert sub.flops_by_module["blocks.0.mlp"] == 9 * 8 * 48**2
