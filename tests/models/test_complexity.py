from __future__ import annotations

import pytest
import timm
import torch

import augsub
from models.build import create_model
from models.complexity import analyze
from models.flop_counting import count_forward, count_with_torch
from models.literature import LITERATURE, Reference
from tests.zoo import load_rows

IMAGENET = (3, 224, 224)
LARGE = ("vit_large_patch16_224", "vit_huge_patch14_224")
# Ops that fvcore and ours leave out: none of them multiplies matrices
ELEMENTWISE = {
    *("add", "add_", "addcmul", "clamp_min", "cos", "cumsum", "div", "div_", "exp", "mul", "mul_", "neg", "pow"),
    *("rsqrt", "rsub", "sin", "sub", "ceil", "linalg_vector_norm", "mean", "sum", "amax", "softmax", "rms_norm"),
    *("gelu", "hardsigmoid", "hardswish", "hardswish_", "hardtanh", "leaky_relu_", "sigmoid", "silu", "silu_"),
    *("avg_pool1d", "avg_pool2d", "max_pool2d", "upsample_linear1d", "dropout_", "one_hot"),
    *("expand_as", "flip", "meshgrid", "pad", "repeat", "repeat_interleave", "reshape_as", "tile", "unfold"),
}


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(reference, id=reference.title, marks=pytest.mark.slow if reference.name in LARGE else ())
        for reference in LITERATURE
    ],
)
def test_the_literature_within_one_percent(reference: Reference):
    model = create_model(reference.name, num_classes=1000)
    complexity = analyze(model, IMAGENET)
    assert complexity.params == sum(parameter.numel() for parameter in model.parameters())
    assert complexity.params == pytest.approx(reference.mega_params * 1e6, rel=0.01)
    assert complexity.main.flops == pytest.approx(reference.giga_flops * 1e9, rel=0.01)
    assert complexity.main.flops == pytest.approx(count_with_torch(model, IMAGENET), rel=0.01)


@pytest.mark.parametrize(
    ("name", "augmentation", "limit"),
    [
        ("vit_base_patch16_224", "masking", 0.51),
        ("swin_base_patch4_window7_224", "random_crop", 0.60),
        ("resnet50", "random_crop", 0.55),
    ],
)
def test_sub_models_that_see_half_cost_half(name, augmentation, limit):
    model = create_model(name)
    complexity = analyze(model, IMAGENET, [augsub.build(augmentation, ratio=0.5)])
    assert 0.4 < complexity.sub_flops / complexity.main.flops <= limit
    assert not augsub.is_patched(model)


def test_training_cost_counts_every_sub_model(make_model):
    model = make_model("vit")
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
    model = timm.create_model(row.smallest).eval()
    shape = model.pretrained_cfg["input_size"]
    counted = count_forward(model, torch.zeros(1, *shape))
    assert set(counted.uncounted) <= ELEMENTWISE
    assert counted.flops >= 0.999 * count_with_torch(model, shape)
