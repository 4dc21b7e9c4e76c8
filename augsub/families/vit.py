"""Plain vision transformers: ViT, DeiT (distilled or not), DeiT-III, CLIP towers."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from augsub.families.base import Family, register_family
from augsub.sites import Site, TokenSite


@register_family(VisionTransformer)
class VisionTransformerFamily(Family):
    """Tokens can be removed right after position embedding: `patch_drop` is timm's own slot for it.

    Everything after that slot, the pre-norm of CLIP towers included, works on any subset of tokens.
    """

    def sites(self, model: nn.Module) -> dict[str, Site]:
        tokens = TokenSite(model.patch_drop, model.patch_embed, model.num_prefix_tokens)
        return {**super().sites(model), "tokens": tokens}
