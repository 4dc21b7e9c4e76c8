"""FLOPs of one forward by fvcore. One FLOP is one multiply-add, as in the papers.

fvcore leaves out what it has no handler for; the handlers that timm's models need besides stand here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import augsub

with warnings.catch_warnings():  # fvcore compiles a function with torch.jit.script, which is deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
    from fvcore.nn.jit_handles import conv_flop_count, elementwise_flop_counter, generic_activation_jit, get_shape

Handler = Callable[[list[Any], list[Any]], float]
CUBIC_TAPS = 16  # 4 x 4 neighbours per output value


@dataclass(frozen=True)
class ForwardCost:
    """What one forward computes.

    Attributes:
        flops: multiply-adds.
        activations: values that convolutions, linear layers, attention and recurrent layers put out.
        flops_by_module: multiply-adds by name of the module; "" is the whole model.
        uncounted: ops without a handler, by name, with the number of their calls.
    """

    flops: int
    activations: int
    flops_by_module: dict[str, int]
    uncounted: dict[str, int]


class SubModelForward(nn.Module):
    """The sub-model as a module of its own, for what takes modules with one input."""

    def __init__(self, model: nn.Module, augmentation: augsub.SubModelAugmentation) -> None:
        super().__init__()
        self.model = model
        self.augmentation = augmentation

    def forward(self, images: Tensor) -> Any:
        return self.model(images, augsub=self.augmentation)


@torch.no_grad()
def count_forward(
    model: nn.Module, images: Tensor, augmentation: augsub.SubModelAugmentation | None = None
) -> ForwardCost:
    """Trace one forward, of the main model or of the sub-model that an augmentation makes.

    Args:
        model: any model in evaluation mode, a patched one if there is an augmentation.
        images: (B, C, H, W).
        augmentation: None for the main model.
    """
    traced, prefix = (model, "") if augmentation is None else (SubModelForward(model, augmentation).eval(), "model.")
    flops = FlopCountAnalysis(traced, images).set_op_handle(**MISSING_FLOPS)
    activations = ActivationCountAnalysis(traced, images).set_op_handle(**MISSING_ACTIVATIONS)
    for analysis in (flops, activations):
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    by_module = {name[len(prefix) :]: int(n) for name, n in flops.by_module().items() if name.startswith(prefix)}
    return ForwardCost(
        flops=int(flops.total()),
        activations=int(activations.total()),
        flops_by_module={**by_module, "": int(flops.total())},
        uncounted={name.removeprefix("aten::"): calls for name, calls in flops.unsupported_ops().items()},
    )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by name of the module; "" is the whole model."""
    return dict(parameter_count(model))


def count_with_torch(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image's forward by torch's own counter, which knows matrix products only.

    Attention is taken apart into such products: not every torch knows its fused CPU kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape))
    return counter.get_total_flops() // 2  # it counts multiplications and additions


def attention_flops(inputs: list[Any], outputs: list[Any]) -> float:
    """softmax(Q K^T) V for Q (..., L, E), K (..., S, E), V (..., S, F)."""
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def convolution_flops(inputs: list[Any], outputs: list[Any]) -> float:
    """A convolution with padding="same" or "valid"."""
    images, weight, output = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
    return conv_flop_count(images, weight, output, transposed=False)


def lstm_flops(inputs: list[Any], outputs: list[Any]) -> float:
    """Every weight matrix of every layer and direction once per position."""
    positions = prod(get_shape(inputs[0])[:-1])
    weights = [get_shape(weight) for weight in inputs[2].node().inputs()]
    return positions * sum(prod(shape) for shape in weights if len(shape) == 2)


MISSING_FLOPS: dict[str, Handler] = {
    "aten::scaled_dot_product_attention": attention_flops,
    "aten::_convolution_mode": convolution_flops,
    "aten::lstm": lstm_flops,
    "aten::upsample_bicubic2d": elementwise_flop_counter(input_scale=0, output_scale=CUBIC_TAPS),
    "aten::im2col": elementwise_flop_counter(input_scale=0),  # copies values
    "aten::col2im": elementwise_flop_counter(input_scale=1),  # adds up every value once
}
MISSING_ACTIVATIONS: dict[str, Handler] = {
    name: generic_activation_jit(name.removeprefix("aten::"))
    for name in ("aten::scaled_dot_product_attention", "aten::_convolution_mode", "aten::lstm")
}
