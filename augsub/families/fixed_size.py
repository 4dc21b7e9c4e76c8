"""Models without a better place than the input, and which take images of their built size only."""

from __future__ import annotations

from augsub.families.base import Family, register_family
from augsub.sites import ForeignModule

POSITION_BOUND = frozenset({"BottleneckAttn", "HaloAttn"})  # attention of ByobNet with tables of a fixed size


class FixedSizeFamily(Family):
    """Their attention biases or position embeddings fit one resolution."""

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return False


class ByobNetFamily(Family):
    """Of the networks built from blocks, those with position-bound attention take one size only."""

    def takes_other_sizes(self, model: ForeignModule) -> bool:
        return not any(
            type(module).__name__ in POSITION_BOUND or getattr(module, "pos_emb", None) is not None
            for module in model.modules()
        )


register_family(FixedSizeFamily(), "efficientformer.EfficientFormer", "efficientformer_v2.EfficientFormerV2", "tnt.TNT")
register_family(ByobNetFamily(), "byobnet.ByobNet")
