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
                yield from scaled_windows(block, model.patch_embed.img_size, image_size)


def scaled_windows(block: nn.Module, built_size: ImageSize, image_size: ImageSize) -> Assignments:
    """Windows with the same share of the map as in the main model, as timm's `set_input_size` gives them.

    Windows of the built size would need padding: at 160 of 224 pixels they cost Swin-B 65 % of the main
    model's FLOPs instead of 51 %. Position biases depend on the distance alone, so those of a smaller
    window are a part of the built ones.
    """
    built_window = block.attn.window_size
    window = tuple(
        max(1, side * now // built) for side, now, built in zip(built_window, image_size, built_size, strict=True)
    )
    rows, columns = window
    index = block.attn.relative_position_index.view(*built_window, *built_window)[:rows, :columns, :rows, :columns]
    yield block.attn, "relative_position_index", index.reshape(rows * columns, rows * columns)
    shifts = tuple(side // 2 if shift else 0 for side, shift in zip(window, block.shift_size, strict=True))
    yield block, "shift_size", shifts
    for module in (block, block.attn):
        yield module, "window_size", window
        if hasattr(module, "window_area"):
            yield module, "window_area", rows * columns


register_family(
    SwinTransformerFamily("patch_embed", "NHWC"),
    "swin_transformer.SwinTransformer",
    "swin_transformer_v2.SwinTransformerV2",
)
register_family(SwinTransformerFamily("patch_embed", "NCHW"), "swin_transformer_v2_cr.SwinTransformerV2Cr")
