"""Swin transformers: window attention needs the whole map, so masked cells become a mask token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import nn

from augsub.families.base import Family, register_family
from augsub.sites import Site, StemSite


@register_family(SwinTransformer)
class SwinTransformerFamily(Family):
    """The stem is `patch_embed`, its norm included; its output is channels last."""

    def sites(self, model: nn.Module) -> dict[str, Site]:
        return {**super().sites(model), "stem": StemSite(model.patch_embed, model)}

    def mask_token_width(self, model: nn.Module) -> int:
        return model.patch_embed.proj.out_channels

    def resized_state(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
        yield model.patch_embed, "strict_img_size", False
        for module in model.modules():
            if hasattr(module, "dynamic_mask"):  # the stored attention mask fits the built size only
                yield module, "dynamic_mask", True
