"""NaFlexViT on ordinary images, where all have one grid."""

from __future__ import annotations

from typing import Any

from augsub.augmentation import Tokens
from augsub.families.base import register_family
from augsub.families.vit import TokenFamily, patch_side
from augsub.sites import ForeignModule, TokenSite


class EmbedsSite(TokenSite):
    """The module returns (tokens with prefix and position embedding, grid size)."""

    def pack(self, tokens: Tokens, output: Any) -> Any:
        return tokens.values, *output[1:]


class NaFlexVitFamily(TokenFamily):
    """Tokens go at `embeds`: timm's own `patch_drop` would not be called in evaluation.

    With rotary embeddings, whose indices only that place passes on, tokens stay and pixels are masked.
    """

    def token_site(self, model: ForeignModule) -> TokenSite | None:
        if model.rope is not None:
            return None
        return EmbedsSite(model.embeds, model.embeds, model.num_prefix_tokens)

    def stride(self, model: ForeignModule) -> int:
        return patch_side(model.embeds)

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return True


register_family(NaFlexVitFamily(), "naflexvit.NaFlexVit")
