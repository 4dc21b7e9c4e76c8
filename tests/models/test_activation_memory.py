"""Memory of activations: against what torch's allocator holds after a forward."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import augsub
from models.activation_memory import activation_memory
from models.build import checkpoint_gradients

SHAPE = (3, 32, 32)
AUTOCAST = {"float32": nullcontext, "bf16": partial(torch.autocast, "cpu", dtype=torch.bfloat16)}


def held_after_forward(model, images, augmentation, autocast) -> int:
    """Bytes allocated and not freed while the graph is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, autocast():
        logits = model(images, augsub=augmentation)
    assert logits.grad_fn is not None
    return sum(event.self_cpu_memory_usage for event in recorded.key_averages()) + images.nbytes


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_it_is_what_a_forward_leaves_in_memory(patched_model, ratio, precision):
    cell = None if hasattr(patched_model, "cls_token") else 16  # px
    augmentation = None if ratio is None else augsub.build("masking", ratio=ratio, cell=cell)
    model, autocast = patched_model.train(), AUTOCAST[precision]
    model(torch.randn(2, *SHAPE))  # what is made at the first forward
    estimate = activation_memory(model, SHAPE, augmentation, autocast)
    measured = held_after_forward(model, torch.randn(16, *SHAPE), augmentation, autocast)
    assert estimate.of(16) == pytest.approx(measured, rel=0.01)


def test_weights_are_no_activations_and_masked_patches_have_none(make_model):
    model = augsub.patch(make_model("vit"))
    whole = activation_memory(model, SHAPE)
    masked = activation_memory(model, SHAPE, augsub.build("masking", ratio=0.5))
    assert whole.fixed == 0  # in float32 all but the weights is of some image
    assert (
        0.5 < masked.per_image / whole.per_image < 0.7
    )  # 8 of 16 patches and the class token; the patch embedding whole


def test_gradient_checkpointing_keeps_less(make_model):
    model = augsub.patch(make_model("vit"))
    whole = activation_memory(model, SHAPE).per_image
    checkpoint_gradients(model)
    assert activation_memory(model, SHAPE).per_image < whole / 3
