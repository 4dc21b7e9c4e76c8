"""Window, hierarchical and relative-position models: blocks need the whole map, so cells become a mask token.

And those without a better place than the input, which take images of their built size only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from augsub.families.base import Family, register_family
from augsub.sites import ForeignModule, Layout, Site, StemSite

POSITION_BOUND = frozenset({"BottleneckAttn", "HaloAttn"})  # attention of ByobNet with tables of a fixed size


@dataclass(frozen=True)
class StemFamily(Family):
    """Models with one stem, whose whole output goes through the blocks.

    Args:
        stem: the stem's name in the model.
        layout: axes of its output; if that is a tuple, of the tuple's first tensor.
        fixed_size: whether the model takes images of its built size only.
    """

    stem: str
    layout: Layout

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        return {**super().sites(model), "stem": StemSite(model.get_submodule(self.stem), model, self.layout)}

    def mask_token_width(self, model: ForeignModule) -> int | None:
        return output_width(model.get_submodule(self.stem))


def output_width(stem: nn.Module) -> int:
    """Channels D of a stem's output: those of the last of its modules that fixes them."""
    for module in reversed(list(stem.modules())):
        for attribute in ("out_channels", "num_features", "normalized_shape", "out_features"):
            width = getattr(module, attribute, None)
            if width is not None and not callable(width):
                return int(width[-1] if isinstance(width, tuple) else width)
    raise ValueError(f"{type(stem).__name__} has no convolution, linear layer or norm that tells its output width")


class CSATv2Family(StemFamily):
    """The stem, a cosine transform, gives brightness and two colours, each by a convolution of its own."""

    def mask_token_width(self, model: ForeignModule) -> int:
        stem = model.get_submodule(self.stem)
        return sum(convolution.out_channels for convolution in (stem.conv_y, stem.conv_cb, stem.conv_cr))


class EfficientNetFamily(StemFamily):
    """Only with norms over the channels of a position; BatchNorm lets zeroed pixels pass."""

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        return super().sites(model) if isinstance(model.bn1, nn.LayerNorm) else Family.sites(self, model)

    def mask_token_width(self, model: ForeignModule) -> int | None:
        return super().mask_token_width(model) if isinstance(model.bn1, nn.LayerNorm) else None


class ByobNetFamily(Family):
    """Of the networks built from blocks, those with position-bound attention take one size only."""

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return not any(
            type(module).__name__ in POSITION_BOUND or getattr(module, "pos_emb", None) is not None
            for module in model.modules()
        )


# Relative positions, gated or of a fixed table
register_family(
    StemFamily("patch_embed", "NLC", fixed_size=True),
    "beit.Beit",
    "convit.ConVit",
    "vision_transformer_relpos.VisionTransformerRelPos",
)
register_family(StemFamily("stem", "NCHW", fixed_size=True), "levit.Levit")
# Token mixing with weights of a fixed length
register_family(StemFamily("stem", "NLC", fixed_size=True), "mlp_mixer.MlpMixer")
# Blocks that reshape the tokens to their grid
register_family(StemFamily("patch_embed", "NLC"), "mvitv2.MultiScaleVit", "xcit.Xcit")
register_family(StemFamily("patch_embeds.0", "NLC"), "twins.Twins")
register_family(StemFamily("patch_embed1", "NLC", fixed_size=True), "coat.CoaT")
# The encoders of multi-modal models put the tokens back on their grid; alone they return that grid
register_family(
    StemFamily("patch_embed", "NHWC", fixed_size=True), "deepseek_vit.DeepseekVitEncoder", "qwen3_vit.Qwen3VitEncoder"
)
register_family(
    StemFamily("encoder.patch_embed", "NHWC"), "deepseek_vit.DeepseekVitClassifier", "qwen3_vit.Qwen3VitClassifier"
)
# Maps with attention in windows, along axes, or over pooled keys
register_family(
    StemFamily("patch_embed", "NHWC"),
    "vision_transformer_sam.VisionTransformerSAM",
    "hieradet_sam2.HieraDet",
    "pvt_v2.PyramidVisionTransformerV2",
)
register_family(
    StemFamily("patch_embed", "NCHW", fixed_size=True), "nest.Nest", "pit.PoolingVisionTransformer", "volo.VOLO"
)
register_family(StemFamily("patch_embed", "NCHW"), "tiny_vit.TinyVit")
register_family(StemFamily("stem", "NCHW"), "davit.DaVit", "focalnet.FocalNet")
# Norms over the channels of a position: a zeroed cell leaves such a stem as zeros, and each norm on its way divides the
# gradient by the root of its eps. With zeroed pixels that of convnext_tiny had a norm of 5.8e10 at the start, beside 34
register_family(StemFamily("stem", "NCHW"), "convnext.ConvNeXt", "edgenext.EdgeNeXt", "metaformer.MetaFormer")
register_family(StemFamily("stem", "NHWC"), "mambaout.MambaOut")
register_family(EfficientNetFamily("bn1", "NCHW"), "efficientnet.EfficientNet")
register_family(CSATv2Family("stem_dct", "NCHW"), "csatv2.CSATv2")
register_family(StemFamily("conv_stem", "NCHW"), "mobilenetv5.MobileNetV5", "mobilenetv5.MobileNetV5Encoder")
register_family(
    StemFamily("stem", "NCHW", fixed_size=True), "maxxvit.MaxxVit", "gcvit.GlobalContextVit", "visformer.Visformer"
)
# No stem whose output goes through the blocks as it is; attention biases or position embeddings fit one resolution
register_family(
    Family(fixed_size=True), "efficientformer.EfficientFormer", "efficientformer_v2.EfficientFormerV2", "tnt.TNT"
)
register_family(ByobNetFamily(), "byobnet.ByobNet")
