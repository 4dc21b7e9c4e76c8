"""Plain vision transformers of Hugging Face Transformers: ViT, DeiT, DINOv2, below their heads."""

from __future__ import annotations

from augsub.families.base import register_family
from augsub.families.vit import TokenFamily, patch_side
from augsub.sites import ForeignModule, TokenSite


class HuggingFaceViTFamily(TokenFamily):
    """Backbones with `embeddings`, whose sequence begins with `num_prefix_tokens` and registers, if any."""

    def __init__(self, num_prefix_tokens: int = 1) -> None:
        self.num_prefix_tokens = num_prefix_tokens

    def token_site(self, model: ForeignModule) -> TokenSite:
        registers = getattr(model.config, "num_register_tokens", 0)
        embeddings = model.embeddings
        return TokenSite(embeddings, embeddings.patch_embeddings, self.num_prefix_tokens + registers)

    def stride(self, model: ForeignModule) -> int:
        return patch_side(model.embeddings.patch_embeddings)


register_family(
    HuggingFaceViTFamily(),
    "transformers.models.vit.modeling_vit.ViTModel",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
)
register_family(HuggingFaceViTFamily(num_prefix_tokens=2), "transformers.models.deit.modeling_deit.DeiTModel")
