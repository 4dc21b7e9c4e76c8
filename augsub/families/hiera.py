"""Hiera: mask units of 8 x 8 stem tokens (32 x 32 pixels) can go, as in its own MAE pretraining."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from augsub.augmentation import Tokens
from augsub.families.base import register_family
from augsub.families.stem import StemFamily
from augsub.sites import ForeignModule, ImageSize, Site, TokenSite


class MaskUnitSite(TokenSite):
    """`unroll` returns (B, M * U, D), M tokens of each of U mask units, unit by unit innermost.

    The augmentation sees a mask unit as one token of width M * D.
    """

    def __init__(self, model: ForeignModule) -> None:
        super().__init__(model.unroll, model.patch_embed, num_prefix_tokens=0)
        self.unit_tokens = model.mu_size
        self.units = tuple(model.mask_spatial_shape)

    def unpack(self, output: Any) -> Tensor:
        tokens = super().unpack(output)
        batch, _, width = tokens.shape
        return tokens.view(batch, self.unit_tokens, -1, width).transpose(1, 2).flatten(2)

    def pack(self, tokens: Tokens, output: Any) -> Any:
        batch, units, _ = tokens.values.shape
        width = output.shape[-1]
        return tokens.values.view(batch, units, self.unit_tokens, width).transpose(1, 2).reshape(batch, -1, width)

    def grid(self, image_size: ImageSize, num_patches: int) -> tuple[int, int]:
        return self.units


class HieraFamily(StemFamily):
    """Mask units are dropped where `unroll` has put the tokens of one unit side by side."""

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        return {**super().sites(model), "tokens": MaskUnitSite(model)}


register_family(HieraFamily("patch_embed", "NLC", fixed_size=True), "hiera.Hiera")
