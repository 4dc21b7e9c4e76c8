"""Plain vision transformers: ViT, DeiT, DeiT-III, CLIP towers, hybrids, ViTamin, CaiT."""

from __future__ import annotations

from augsub.families.base import Family, register_family
from augsub.sites import ForeignModule, Site, TokenSite


class TokenFamily(Family):
    """Transformers whose blocks take any subset of the tokens: they need one site `tokens`."""

    def token_site(self, model: ForeignModule) -> TokenSite | None:
        """Where tokens can go; None if this model is an exception."""
        raise NotImplementedError

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        tokens = self.token_site(model)
        return {**super().sites(model), **({"tokens": tokens} if tokens else {})}

    def stride(self, model: ForeignModule) -> int:
        return patch_side(model.patch_embed)

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return bool(getattr(model, "dynamic_img_size", False))


def patch_side(patch_embed: ForeignModule) -> int:
    """Side of a patch in pixels, the longer one if they differ."""
    size: tuple[int, int] = patch_embed.patch_size
    return max(size)


class VisionTransformerFamily(TokenFamily):
    """`patch_drop` is timm's own slot right after position embedding.

    Everything after that slot, the pre-norm of CLIP towers included, works on any subset of tokens.
    """

    def token_site(self, model: ForeignModule) -> TokenSite:
        return TokenSite(model.patch_drop, model.patch_embed, model.num_prefix_tokens)


class CaitFamily(TokenFamily):
    """The class token joins after the blocks, so the sequence has no prefix at `pos_drop`."""

    def token_site(self, model: ForeignModule) -> TokenSite:
        return TokenSite(model.pos_drop, model.patch_embed, num_prefix_tokens=0)


register_family(VisionTransformerFamily(), "vision_transformer.VisionTransformer")
register_family(CaitFamily(), "cait.Cait")
