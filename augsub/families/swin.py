"""Swin transformers: stem features become a mask token; crops of the image get windows that fit."""

from __future__ import annotations

from collections.abc import Iterator

from augsub.families.base import register_family
from augsub.families.stem import StemFamily
from augsub.families.window_groups import WindowGroupSite, with_windows
from augsub.sites import Assignment, ForeignModule, ImageSize, Site


class SwinTransformerFamily(StemFamily):
    """The stem is `patch_embed`, its norm included."""

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        sites = super().sites(model)
        if len(model.layers) > 1:
            windows = WindowGroupSite(model)
            if windows.divides(model.patch_embed.grid_size):
                sites["windows"] = windows
        return sites

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        yield model.patch_embed, "strict_img_size", False
        for block in model.modules():
            if hasattr(block, "dynamic_mask"):
                yield from scaled_windows(block, model.patch_embed.img_size, image_size)


class SwinTransformerV2CrFamily(StemFamily):
    """As Swin, but position biases of this one are computed for its built windows."""

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        yield model.patch_embed, "strict_img_size", False
        for block in model.modules():
            if hasattr(block, "dynamic_mask"):
                yield block, "dynamic_mask", True  # the stored attention mask fits the built size only


def scaled_windows(block: ForeignModule, built_size: ImageSize, image_size: ImageSize) -> Iterator[Assignment]:
    """Windows with the same share of the map as in the main model, as timm's `set_input_size` gives them.

    Windows of the built size would need padding: at 160 of 224 pixels they cost Swin-B 65 % of the main
    model's FLOPs instead of 51 %.
    """
    window = tuple(
        max(1, side * now // built)
        for side, now, built in zip(block.attn.window_size, image_size, built_size, strict=True)
    )
    shifts = tuple(side // 2 if shift else 0 for side, shift in zip(window, block.shift_size, strict=True))
    yield from with_windows(block, window, shifts)


register_family(
    SwinTransformerFamily("patch_embed", "NHWC"),
    "swin_transformer.SwinTransformer",
    "swin_transformer_v2.SwinTransformerV2",
)
register_family(SwinTransformerV2CrFamily("patch_embed", "NCHW"), "swin_transformer_v2_cr.SwinTransformerV2Cr")
