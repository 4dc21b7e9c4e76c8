"""Gemma 4 vision towers: every token travels with its (x, y) position."""

from __future__ import annotations

from typing import Any

from augsub.augmentation import Tokens
from augsub.families.base import register_family
from augsub.families.vit import TokenFamily, patch_side
from augsub.sites import ForeignModule, TokenSite


class PositionedTokenSite(TokenSite):
    """`patch_embed` returns (tokens, positions (B, N, 2), padding (B, N) or None)."""

    def pack(self, tokens: Tokens, output: Any) -> Any:
        _, positions, padding = output
        if tokens.kept is not None:
            positions = positions.gather(1, tokens.kept.unsqueeze(-1).expand(-1, -1, positions.shape[-1]))
            padding = padding if padding is None else padding.gather(1, tokens.kept)
        return tokens.values, positions, padding


class Gemma4VitFamily(TokenFamily):
    """The encoder stands alone, or as `encoder` of a classifier. Rotary embedding goes by positions."""

    def token_site(self, model: ForeignModule) -> TokenSite | None:
        encoder = encoder_of(model)
        if encoder.global_pool == "soft":  # pools k x k patches of the whole grid
            return None
        return PositionedTokenSite(encoder.patch_embed, encoder.patch_embed, num_prefix_tokens=0)

    def stride(self, model: ForeignModule) -> int:
        return patch_side(encoder_of(model).patch_embed)

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return model is not encoder_of(model)  # an encoder alone returns as many tokens as the image has


def encoder_of(model: ForeignModule) -> ForeignModule:
    """The encoder of a classifier, or the model itself."""
    return getattr(model, "encoder", model)


register_family(Gemma4VitFamily(), "gemma4_vit.Gemma4VitEncoder", "gemma4_vit.Gemma4VitClassifier")
