"""CrossViT: two streams of tokens, of fine and of coarse patches, which exchange class tokens only."""

from __future__ import annotations

from augsub.families.base import register_family
from augsub.families.vit import TokenFamily, patch_side
from augsub.sites import ForeignModule, ImageSize, TokenSite


class StreamSite(TokenSite):
    """`pos_drop` is called once per stream; each stream is augmented by itself, with a draw of its own."""

    def grid(self, image_size: ImageSize, num_patches: int) -> tuple[int, int] | None:
        # The model resizes every image to the fixed size of each stream.
        for stream in self.patch_embed:
            rows, columns = (side // patch for side, patch in zip(stream.img_size, stream.patch_size, strict=True))
            if rows * columns == num_patches:
                return rows, columns
        return None


class CrossVitFamily(TokenFamily):
    """Both streams have one class token in front."""

    def token_site(self, model: ForeignModule) -> TokenSite:
        return StreamSite(model.pos_drop, model.patch_embed, num_prefix_tokens=1)

    def stride(self, model: ForeignModule) -> int:
        return max(map(patch_side, model.patch_embed))

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return True


register_family(CrossVitFamily(), "crossvit.CrossVit")
