"""What a model costs: parameters, FLOPs of main model and sub-models, cost of a training step, memory of activations.

One FLOP is one multiply-add, as in the papers. Shapes are all that counts, so that forwards run on meta tensors, which
have nothing else; what an operation costs is what fvcore counts for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.efficientvit_msra import ResidualDrop
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import augsub
from models.build import check_image_shape, without_data

MEGA, GIGA = 1e6, 1e9
POINTS = 20  # in time, of a ratio that changes
MANY = 1000  # images, of which every share is exact enough
Formula = Callable[[Sequence[Any], Any], float]  # of an operation's arguments and its output


@dataclass(frozen=True)
class ForwardCost:
    """What one forward computes.

    Attributes:
        flops: multiply-adds.
        activations: values that convolutions, linear layers, attention and recurrent layers put out.
        uncounted: operations without a formula, by name, with the number of their calls.
    """

    flops: int
    activations: int
    uncounted: dict[str, int]


@dataclass(frozen=True)
class Complexity:
    """Cost of one model for one image.

    Attributes:
        params: parameters of the model, without what `augsub.patch` adds.
        main: the main model's forward.
        names: of each sub-model.
        subs: the forward of each sub-model, in the mean over training, by the images of the main model.
        skipping: the main model's forward in training, if its own dropped paths are skipped.
        computes_main: whether a training step computes the main model.
        taught: multiply-adds of the forwards of other models that teach, which have no backward; at most so many of one
            that sees what the sub-model sees.
    """

    params: int
    main: ForwardCost
    names: tuple[str, ...]
    subs: tuple[ForwardCost, ...]
    skipping: ForwardCost | None = None
    computes_main: bool = True
    taught: int = 0

    @property
    def sub_flops(self) -> int:
        """Multiply-adds of all sub-models together."""
        return sum(sub.flops for sub in self.subs)

    @property
    def training_flops(self) -> int:
        """Multiply-adds of all forwards of a training step; one without a backward counts as a third."""
        main = (self.skipping or self.main).flops if self.computes_main else 0
        return main + self.sub_flops + self.taught // 3

    @property
    def training_cost(self) -> float:
        """FLOPs of a training step relative to plain training: (main + sum of subs) / main for MaskSub."""
        return self.training_flops / self.main.flops

    @property
    def uncounted(self) -> dict[str, int]:
        """Operations of any of these forwards that have no formula, with the number of their calls."""
        calls = sum((Counter(forward.uncounted) for forward in (self.main, *self.subs)), Counter[str]())
        return dict(sorted(calls.items()))

    def as_dict(self) -> dict[str, float]:
        """The figures as plain numbers."""
        return {
            "params": self.params,
            "main_flops": self.main.flops,
            "sub_flops": self.sub_flops,
            "training_cost": self.training_cost,
            "activations": self.main.activations,
        }

    def cost_rows(self) -> list[tuple[str, str]]:
        """Parameters and FLOPs for people, (name, value)."""
        main = self.main.flops
        subs = [
            (f"sub-model {name}", _of_main(sub.flops, main)) for name, sub in zip(self.names, self.subs, strict=True)
        ]
        return [
            ("parameters", f"{figure(self.params, MEGA)} M"),
            ("main model", f"{figure(main, GIGA)} GFLOPs"),
            *([("skipped paths", _of_main(self.skipping.flops, main))] if self.skipping else []),
            *subs,
            *([("teachers", _of_main(self.taught, main) + ", forward alone")] if self.taught else []),
            ("training cost", f"{self.training_cost:.3f} of plain training"),
        ]


def figure(count: int, unit: float) -> str:
    """Four significant digits."""
    return f"{count / unit:.4g}"


def _of_main(flops: int, main: int) -> str:
    return f"{figure(flops, GIGA)} GFLOPs, {flops / main:.3f} of main"


def analyze(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    augmentations: Sequence[augsub.SubModelAugmentation] = (),
    skip_dropped_paths: bool = False,
) -> Complexity:
    """Count one forward of the main model and of each sub-model, all in evaluation mode.

    Skipped paths are a share of a batch's images: where there are some, an image is a part of `MANY`.

    Args:
        model: a model that is not patched, on any device; it is put into evaluation mode.
        image_shape: (C, H, W).
        augmentations: one for each sub-model.
        skip_dropped_paths: as `augsub.patch` takes it; the main model's forward is counted with it too.

    Raises:
        ValueError: if an augmentation has no site in the model, or images of that shape do not fit.
    """
    params = sum(parameter.numel() for parameter in model.eval().parameters())
    augsub.patch(model, skip_dropped_paths=skip_dropped_paths)
    try:
        check_image_shape(model, image_shape, augmentations)
        main = count_forward(model, (1, *image_shape))
        for module in model.modules():
            if skip_dropped_paths and isinstance(module, DropPath | ResidualDrop):
                module.train()  # which alone decides whether it skips
        counts = [MANY if skip_dropped_paths or each.skips_paths else 1 for each in augmentations]
        subs = [
            _mean([count_forward(model, (images, *image_shape), augmentation)], 1 / images)
            for augmentation, images in zip(augmentations, counts, strict=True)
        ]
        skipping = _mean([count_forward(model, (MANY, *image_shape))], 1 / MANY) if skip_dropped_paths else None
    finally:
        augsub.unpatch(model).eval()
    return Complexity(params, main, tuple(map(str, augmentations)), tuple(subs), skipping)


def analyze_objective(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    objective: augsub.Objective,
    epochs: float,
    skip_dropped_paths: bool = False,
    teacher: nn.Module | None = None,
) -> Complexity:
    """Count a training step of an objective: shares of a batch, and means over the epochs where ratios change.

    Args:
        model: as `analyze` takes it.
        image_shape: (C, H, W).
        objective: the objective.
        epochs: of the training.
        skip_dropped_paths: as `analyze` takes it.
        teacher: the model of ``learn_from="teacher"``; patched, if it sees what a sub-model sees.

    Raises:
        ValueError: as `analyze`.
    """
    times = [epochs * (place + 0.5) / POINTS for place in range(POINTS)]
    by_sub_model = [[sub_model.at(time) for time in times] for sub_model in objective.sub_models]
    distinct = {repr(augmentation): augmentation for of_one in by_sub_model for augmentation in of_one}
    counted = analyze(model, image_shape, list(distinct.values()), skip_dropped_paths)
    costs = dict(zip(distinct, counted.subs, strict=True))
    subs, taught = [], 0.0
    for of_one, sub_model in zip(by_sub_model, objective.sub_models, strict=True):
        subs.append(_mean([costs[repr(augmentation)] for augmentation in of_one], sub_model.share))
        lesson = augsub.LESSONS.get(sub_model.learn_from)
        if lesson.needs_model == "ema":
            taught += counted.main.flops * sub_model.share
        elif lesson.needs_model == "teacher" and teacher is not None:
            seen = of_one if lesson.replays_draws else [None]
            forwards = [count_forward(teacher.eval(), (MANY, *image_shape), augmentation) for augmentation in seen]
            taught += _mean(forwards, sub_model.share / MANY).flops
    names = tuple(map(str, objective.sub_models))
    return Complexity(
        counted.params,
        counted.main,
        names,
        tuple(subs),
        counted.skipping,
        objective.computes_main,
        round(taught),
    )


def _mean(costs: Sequence[ForwardCost], share: float) -> ForwardCost:
    """Of forwards that take turns, for a share of the images."""
    part = share / len(costs)
    return ForwardCost(
        round(part * sum(cost.flops for cost in costs)),
        round(part * sum(cost.activations for cost in costs)),
        costs[0].uncounted,
    )


def count_forward(
    model: nn.Module, shape: Sequence[int], augmentation: augsub.SubModelAugmentation | None = None
) -> ForwardCost:
    """Count one forward, of the main model or of the sub-model that an augmentation makes.

    Args:
        model: any model in evaluation mode, a patched one if there is an augmentation.
        shape: of the input, (B, C, H, W) of images.
        augmentation: None for the main model.
    """
    arguments = {} if augmentation is None else {"augsub": augmentation}

    def counted(call: Callable[..., Any]) -> _ForwardCounter:
        with torch.inference_mode(), _ForwardCounter() as counter:
            call(model, shape, arguments)
        return counter

    counter = without_data(counted)
    return ForwardCost(round(counter.flops), counter.activations, dict(counter.uncounted))


def count_with_torch(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image's forward by torch's own counter, which knows matrix products only.

    Attention is taken apart into such products: not every torch knows its fused CPU kernel.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        without_data(lambda call: call(model, (1, *image_shape)))
    return counter.get_total_flops() // 2  # it counts multiplications and additions


def activation_memory(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    images: int,
    augmentation: augsub.SubModelAugmentation | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    skip_dropped_paths: bool = False,
) -> int:
    """Bytes that autograd holds at the end of a training forward, beside parameters and buffers.

    Measured with two and with three images (BatchNorm refuses one; of skipped paths ten and twenty have exact shares),
    where the model is and with the kernels that run there, and scaled: an image always adds as much, what autocast has
    converted is there once. What backward itself needs for a while is not in it, nor the block that
    `train.grad_checkpointing` computes again.

    Args:
        model: a patched model; its BatchNorm statistics and random state go on.
        image_shape: (C, H, W).
        images: how many at once.
        augmentation: of a sub-model; None for the main model.
        autocast: makes the context of a forward.
        skip_dropped_paths: as the model was patched.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept_bytes(count: int) -> int:
        """Of the images and of all storages that tensors saved for backward lie in, each counted once."""
        batch = torch.randn(count, *image_shape, device=next(model.parameters()).device)
        kept = {batch.untyped_storage().data_ptr(): batch.nbytes}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with autocast(), saved_tensors_hooks(note, lambda tensor: tensor):
            output = model.train()(batch, augsub=augmentation)
        del output  # until here nothing of the graph is freed, so that no address was used twice
        return sum(kept.values())

    skips = skip_dropped_paths or (augmentation is not None and augmentation.skips_paths)
    few, more = (10, 20) if skips else (2, 3)
    least, most = kept_bytes(few), kept_bytes(more)
    return least + (images - few) * (most - least) // (more - few)


class _ForwardCounter(TorchDispatchMode):
    """Counts what runs inside: of composed operations those with a formula as they are, the others by their parts.

    In inference mode they arrive here before they are taken apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.activations = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name not in FLOPS:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if name in FLOPS:
            self.flops += FLOPS[name](args, first)
            self.activations += first.numel() if name in MATRIX_PRODUCTS else 0
        elif isinstance(first, Tensor) and first.is_floating_point() and not (func.is_view or name in MOVES):
            self.uncounted[name] += 1
        return output


def _product(factor: int) -> Formula:
    """A matrix product, whose argument of that number has the dimension that is summed over as its last."""
    return lambda args, output: output.numel() * args[factor].shape[-1]


def _convolution(args: Sequence[Any], output: Tensor) -> float:
    """Every weight once per position: of the output, of a transposed convolution of the input."""
    images, weight, transposed = args[0], args[1], args[6]
    return len(images) * weight.numel() * prod((images if transposed else output).shape[2:])


def _attention(args: Sequence[Any], output: Tensor) -> float:
    """softmax(Q K^T) V for Q (..., L, E), K (..., S, E), V (..., S, F)."""
    query, key, value = args[:3]
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _lstm(args: Sequence[Any], output: Tensor) -> float:
    """Every weight matrix of every layer and direction once per position."""
    return prod(args[0].shape[:-1]) * sum(weight.numel() for weight in args[2] if weight.ndim == 2)


def _norm(weight: int, of_input: int = 5) -> Formula:
    """A norm whose argument of that number is its weight, one multiply-add less without one."""
    return lambda args, output: args[0].numel() * (of_input - (args[weight : weight + 1] in ((), (None,))))


def _elementwise(of_input: int, of_output: int) -> Formula:
    """So many for each value of the input and of the output."""
    return lambda args, output: of_input * args[0].numel() + of_output * output.numel()


MATRIX_PRODUCTS: dict[str, Formula] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _product(1)),
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
    "lstm": _lstm,
}
FLOPS: dict[str, Formula] = {
    **MATRIX_PRODUCTS,
    "batch_norm": _norm(1, of_input=2),  # with running statistics
    "layer_norm": _norm(2),
    "group_norm": _norm(2),
    "instance_norm": _norm(1),
    "adaptive_avg_pool2d": _elementwise(1, 0),
    "upsample_nearest2d": _elementwise(0, 1),
    "upsample_bilinear2d": _elementwise(0, 4),
    "upsample_bicubic2d": _elementwise(0, 16),  # 4 x 4 neighbours
    "grid_sampler": _elementwise(0, 4),
    "im2col": _elementwise(0, 0),  # copies values
    "col2im": _elementwise(1, 0),  # adds up every value once
}
MOVES = {  # make and move values, and compute none
    *("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "linspace", "eye", "rand"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "full_like", "empty_like"),
    *("cat", "stack", "clone", "copy_", "_to_copy", "fill_", "zero_", "lift_fresh", "lift_fresh_copy"),
    *("index", "_unsafe_index", "index_select", "index_put_", "gather", "scatter", "masked_fill", "masked_fill_"),
    *("where", "roll", "flip", "repeat", "constant_pad_nd", "reflection_pad2d", "_unsafe_view", "as_strided_"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "embedding", "tril", "triu"),
}
