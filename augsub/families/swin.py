"""Swin transformers: stem features become a mask token; crops of the image get windows that fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from augsub.families.base import register_family
from augsub.families.stem import StemFamily
from augsub.sites import ImageSize

Assignments = Iterator[tuple[nn.Module, str, Any]]


class SwinTransformerFamily(StemFamily):
    """The stem is `patch_embed`, its norm included."""

    def resized_state(self, model: nn.Module, image_size: ImageSize) -> Assignments:
        yield model.patch_embed, "strict_img_size", False
        for block in model.modules():
            if not hasattr(block, "dynamic_mask"):
                continue
            yield block, "dynamic_mask", True  # the stored attention mask fits the built size only
            if hasattr(block.attn, "relative_position_index"):
                yield from fitting_windows(block, model.patch_embed.img_size, image_size)


def fitting_windows(block: nn.Module, built_size: ImageSize, image_size: ImageSize) -> Assignments:
    """As many windows as the map needs, none larger than that takes.

    A map of 10 x 10 positions needs two windows of 7 per side: two of 5 hold it without padding.
    Position biases depend on the distance alone, so those of a smaller window are a part of the built ones.
    """
    resolution = [
        -(-side * now // built) for side, now, built in zip(block.input_resolution, image_size, built_size, strict=True)
    ]
    windows = [-(-side // window) for side, window in zip(resolution, block.window_size, strict=True)]
    size = tuple(-(-side // number) for side, number in zip(resolution, windows, strict=True))
    shifts = [
        side // 2 if any(block.target_shift_size) and number > 1 else 0
        for side, number in zip(size, windows, strict=True)
    ]
    built = block.attn.window_size
    index = block.attn.relative_position_index.view(*built, *built)
    index = index[: size[0], : size[1], : size[0], : size[1]].reshape(size[0] * size[1], -1)
    yield block, "shift_size", tuple(shifts)
    yield block.attn, "relative_position_index", index
    for module in (block, block.attn):
        yield module, "window_size", size
        if hasattr(module, "window_area"):
            yield module, "window_area", size[0] * size[1]


register_family(
    SwinTransformerFamily("patch_embed", "NHWC"),
    "swin_transformer.SwinTransformer",
    "swin_transformer_v2.SwinTransformerV2",
)
register_family(SwinTransformerFamily("patch_embed", "NCHW"), "swin_transformer_v2_cr.SwinTransformerV2Cr")
