"""Plain vision transformers: ViT, DeiT, CLIP towers, hybrids, ViTamin, CaiT, NaFlexViT, and Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.layers import Format

from augsub.augmentation import Tokens
from augsub.families.base import Family, register_family
from augsub.sites import Assignment, ForeignModule, ImageSize, Site, TokenSite


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
    """Side of a patch in pixels, the longer one if they differ. A hybrid's own are of its backbone's positions."""
    if hasattr(patch_embed, "feat_ratio"):
        return int(patch_embed.feat_ratio())
    size: tuple[int, int] = patch_embed.patch_size
    return max(size)


class VisionTransformerFamily(TokenFamily):
    """`patch_drop` is timm's own slot right after position embedding.

    Everything after that slot, the pre-norm of CLIP towers included, works on any subset of tokens.
    """

    def token_site(self, model: ForeignModule) -> TokenSite:
        return TokenSite(model.patch_drop, model.patch_embed, model.num_prefix_tokens)

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return True

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        """What timm's `dynamic_img_size` sets, so that the position embedding is resampled to the smaller grid."""
        if not model.dynamic_img_size:
            yield model, "dynamic_img_size", True
            yield model.patch_embed, "strict_img_size", False
            yield model.patch_embed, "flatten", False
            yield model.patch_embed, "output_fmt", Format.NHWC


class CaitFamily(TokenFamily):
    """The class token joins after the blocks, so the sequence has no prefix at `pos_drop`."""

    def token_site(self, model: ForeignModule) -> TokenSite:
        return TokenSite(model.pos_drop, model.patch_embed, num_prefix_tokens=0)


class EmbedsSite(TokenSite):
    """The module returns (tokens with prefix and position embedding, grid size)."""

    def pack(self, tokens: Tokens, output: Any) -> Any:
        return tokens.values, *output[1:]


class NaFlexVitFamily(TokenFamily):
    """NaFlexViT on ordinary images, where all have one grid.

    Tokens go at `embeds`: timm's own `patch_drop` would not be called in evaluation.
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


@dataclass(frozen=True)
class HuggingFaceViTFamily(TokenFamily):
    """ViT, DeiT, DINOv2 of Transformers, below their heads.

    The sequence of their `embeddings` begins with `num_prefix_tokens` and registers, if any.
    """

    num_prefix_tokens: int = 1

    def token_site(self, model: ForeignModule) -> TokenSite:
        registers = getattr(model.config, "num_register_tokens", 0)
        embeddings = model.embeddings
        return TokenSite(embeddings, embeddings.patch_embeddings, self.num_prefix_tokens + registers)

    def stride(self, model: ForeignModule) -> int:
        return patch_side(model.embeddings.patch_embeddings)


register_family(VisionTransformerFamily(), "vision_transformer.VisionTransformer")
register_family(CaitFamily(), "cait.Cait")
register_family(NaFlexVitFamily(), "naflexvit.NaFlexVit")
register_family(
    HuggingFaceViTFamily(),
    "transformers.models.vit.modeling_vit.ViTModel",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
)
register_family(HuggingFaceViTFamily(num_prefix_tokens=2), "transformers.models.deit.modeling_deit.DeiTModel")
