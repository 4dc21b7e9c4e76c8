"""EVA, EVA-02, DINOv3, PE: vision transformers with rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from augsub.augmentation import Tokens
from augsub.families.base import register_family
from augsub.families.vit import TokenFamily
from augsub.sites import Assignment, ForeignModule, TokenSite


class AllTokens(nn.Module):
    """What timm's patch dropout returns if it drops nothing: all tokens, and no indices."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens, None


class IndexedTokenSite(TokenSite):
    """The module returns (tokens, indices): the rotary embeddings are gathered by the indices of the kept patches."""

    def pack(self, tokens: Tokens, output: Any) -> Any:
        indices = output[1]  # of timm's own patch dropout
        if tokens.kept is not None:
            indices = tokens.kept if indices is None else indices.gather(1, tokens.kept)
        return tokens.values, indices


class EvaFamily(TokenFamily):
    """`patch_drop` is None in most models, and its place is called in training and evaluation."""

    def missing_modules(self, model: ForeignModule) -> Iterator[Assignment]:
        yield from super().missing_modules(model)
        if model.patch_drop is None:
            yield model, "patch_drop", AllTokens()

    def token_site(self, model: ForeignModule) -> TokenSite:
        return IndexedTokenSite(model.patch_drop, model.patch_embed, model.num_prefix_tokens)


register_family(EvaFamily(), "eva.Eva")
