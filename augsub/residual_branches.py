"""Residual branches that are computed for those images alone whose path is kept.

Stochastic depth (arXiv 1603.09382) computes a branch for all images and throws some away. Here, as in DINOv2 (arXiv
2304.07193, section 5), the images are chosen at the branch's start, and what it gives is put back at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.efficientvit_msra import ResidualDrop
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Where a branch starts, for each drop path of a block: the first module that has its input from nowhere else and whose
# input nobody else uses. The blocks are classes of timm.models. One that is not here keeps other inputs of the whole
# batch beside the branch (position tables of each image, queries of all windows, a shared sum), or joins two streams.
STARTS = {
    "drop_path1: norm1, drop_path2: norm2": """
        beit.Block deepseek_vit.DeepseekVitBlock efficientformer.MetaBlock1d
        eva.EvaBlock focalnet.FocalNetBlock maxxvit.PartitionAttentionCl maxxvit.ParallelPartitionAttention
        maxxvit.TransformerBlock2d metaformer.MetaFormerBlock nest.TransformerLayer
        mobilevit.LinearTransformerBlock pvt_v2.Block swin_transformer.SwinTransformerBlock twins.Block
        vision_transformer.Block vision_transformer_relpos.RelPosBlock vision_transformer_sam.Block volo.ClassBlock
        volo.Outlooker volo.Transformer""",
    "drop_path: norm1 norm2": """
        cait.LayerScaleBlock cait.LayerScaleBlockClassAttn coat.SerialBlock convit.Block mlp_mixer.MixerBlock
        mlp_mixer.ResBlock sequencer.Sequencer2dBlock visformer.Block""",
    # the norm before it may feed the shortcut too, where a block changes the resolution
    "drop_path1: attn, drop_path2: norm2": "hiera.HieraBlock hieradet_sam2.MultiScaleBlock mvitv2.MultiScaleBlock",
    # norms come after attention and MLP
    "drop_path1: attn, drop_path2: mlp": """
        eva.EvaBlockPostNorm levit.LevitBlock swin_transformer_v2.SwinTransformerV2Block
        swin_transformer_v2_cr.SwinTransformerV2CrBlock vision_transformer.ResPostBlock
        vision_transformer_relpos.ResPostRelPosBlock""",
    "drop_path1: norm, drop_path2: mlp": "fastvit.AttentionBlock",
    "drop_path1: token_mixer, drop_path2: mlp": """
        efficientformer.MetaBlock2d efficientformer_v2.EfficientFormerV2Block""",
    "drop_path: norm_in norm_mlp_in norm_out norm_mlp": "tnt.Block",
    "drop_path: norm_xca norm": "edgenext.SplitTransposeBlock",
    "drop_path: attn linear": "swiftformer.Block",
    "attn_drop_path: mhca, mlp_drop_path: norm": "nextvit.NextConvBlock",
    "mhsa_drop_path: e_mhsa, mhca_drop_path: mhca, mlp_drop_path: norm2": "nextvit.NextTransformerBlock",
    "drop_path: norm1": "crossvit.CrossAttentionBlock",
    "drop_path: norm": """
        mambaout.GatedConvBlock mlp_mixer.SpatialGatingBlock _efficientnet_blocks.MobileAttention
        torch.nn.modules.container.Sequential""",  # the parallel branches of vision_transformer.ParallelThingsBlock
    "drop_path: pre_norm": "maxxvit.MbConvBlock vitamin.MbConvLNBlock",
    "drop_path: main": "cpubone.ResidualBlock lowformer.ResidualBlock",
    "drop_path: mlp": "fastvit.RepMixerBlock levit.LevitDownsample",
    "drop_path: token_mixer": "inception_next.MetaNeXtBlock",
    "drop_path: module": "iformer.Residual",
    "drop_path: stack": "xception_aligned.PreXceptionModule xception_aligned.XceptionModule",
    "drop_path: spatial_mixing": "fasternet.MLPBlock",
    "drop_path: dwconv": "starnet.Block swiftformer.ConvEncoder swiftformer.LocalRepresentation",
    "drop_path: conv_dw": """
        convnext.ConvNeXtBlock edgenext.ConvBlock maxxvit.ConvNeXtBlock _efficientnet_blocks.DepthwiseSeparableConv""",
    "drop_path: conv": "_efficientnet_blocks.ConvBnAct",
    "drop_path: conv_pw": "_efficientnet_blocks.InvertedResidual",
    "drop_path: conv_exp": "_efficientnet_blocks.EdgeResidual",
    "drop_path: conv_exp|conv_dw": "rexnet.LinearBottleneck",  # the first one is not everywhere
    "drop_path: dw_start": "_efficientnet_blocks.UniversalInvertedResidual",
    # activations and norms before it may feed the shortcut too
    "drop_path: conv1": """
        cspnet.BottleneckBlock cspnet.DarkBlock cspnet.EdgeBlock cspnext.CspNextBlock nfnet.NormFreeBlock
        regnet.Bottleneck regnet.PreBottleneck res2net.Bottle2neck resnet.BasicBlock resnet.Bottleneck
        resnetv2.PreActBasic resnetv2.PreActBottleneck resnetv2.Bottleneck sknet.SelectiveKernelBasic
        sknet.SelectiveKernelBottleneck tresnet.BasicBlock tresnet.Bottleneck""",
    "drop_path: conv1_1x1": "byobnet.BottleneckBlock byobnet.DarkBlock byobnet.SelfAttnBlock",
    "drop_path: conv1_kxk": "byobnet.BasicBlock byobnet.EdgeBlock",
}


@dataclass(eq=False)
class ResidualBranch:
    """The branches of a block that belong to one drop path.

    Attributes:
        drop_path: stochastic depth, in timm's form.
        starts: one module for each time that the block calls the drop path.
        end: its output is the branch's: the drop path itself, or what EfficientViT's (MSRA) has inside.
        attention: EVA's, which takes rotary positions beside the values; None in other blocks.
        rate: share of the images that are left out, while they are; 0 computes all.
        batch: number of images, meanwhile.
    """

    drop_path: nn.Module
    starts: tuple[nn.Module, ...]
    end: nn.Module
    attention: nn.Module | None = None
    rate: float = 0.0
    batch: int = 0

    def __post_init__(self) -> None:
        self._kept: Tensor | None = None

    def skipping(self, rate: float, batch: int) -> list[tuple[Any, str, Any]]:
        """The attributes (object, name, value) with which int(batch * (1 - rate)) images are computed."""
        return [(self, "rate", rate), (self, "batch", batch), (self.drop_path, rate_name(self.drop_path), 0.0)]

    def hook(self) -> list[RemovableHandle]:
        """Let the modules choose and put back images, whenever there is a rate."""
        before = [start.register_forward_pre_hook(self.choose) for start in self.starts]
        if self.attention is not None:
            before.append(self.attention.register_forward_pre_hook(self.choose_positions, with_kwargs=True))
        return [*before, self.end.register_forward_hook(self.put_back)]

    def choose(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Values of int(B * (1 - rate)) images, at least one of them, drawn anew; each has as many rows."""
        if not self.rate:
            return None
        values, *others = args
        self._kept = torch.randperm(self.batch, device=values.device)[: images_kept(self.batch, self.rate)]
        with_images, undo = _by_image(values, self.batch)
        return (undo(with_images.index_select(0, self._kept)), *others)

    def choose_positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Rotary positions of the chosen images, where masking has given each image its own, (B, 1, N, D)."""
        positions = kwargs.get("rope")
        if self._kept is None or positions is None or positions.ndim != 4 or len(positions) != self.batch:
            return None
        return args, {**kwargs, "rope": positions.index_select(0, self._kept)}

    def put_back(self, module: nn.Module, args: tuple[Any, ...], values: Tensor) -> Tensor | None:
        """Values of the chosen images, scaled to the mean of a branch that all have, and zeros for the others."""
        if not self.rate:
            return None
        kept, self._kept = self._kept, None
        if kept is None:
            raise ValueError("the start of a residual branch was replaced after augsub.patch: patch the model again")
        if getattr(self.drop_path, "scale_by_keep", True):
            values = values * (self.batch / len(kept))
        with_images, undo = _by_image(values, len(kept))
        whole: Tensor = with_images.new_zeros((self.batch, *with_images.shape[1:]))
        return undo(whole.index_copy_(0, kept, with_images))


def images_kept(batch: int, rate: float) -> int:
    """How many of so many images have a branch that is skipped at a rate: int(B * (1 - rate)), at least one."""
    return max(1, int(batch * (1 - rate)))


def _by_image(values: Tensor, batch: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Values with the images in dimension 0 and in the order in which memory has them, and the way back."""
    is_map = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    in_order = values.permute(0, 2, 3, 1) if is_map else values
    has_parts = len(values) != batch

    def undo(changed: Tensor) -> Tensor:
        rows = changed.flatten(0, 1) if has_parts else changed
        return rows.permute(0, 3, 1, 2) if is_map else rows

    return in_order.unflatten(0, (batch, -1)) if has_parts else in_order, undo


def rate_name(drop_path: nn.Module) -> str:
    """The attribute with its rate: timm's DropPath has another one than the residuals of EfficientViT (MSRA)."""
    return "drop_prob" if hasattr(drop_path, "drop_prob") else "drop"


def branches_of(model: nn.Module, drop_paths: Iterable[nn.Module]) -> tuple[list[ResidualBranch], list[str]]:
    """The branches that end in the drop paths of a model, and the names of those that cannot be cut out."""
    wanted, branches, uncut = {*drop_paths}, [], []
    for name, block in model.named_modules():
        ends = {drop: block._modules[drop] for drop in block._modules if block._modules[drop] in wanted}
        starts = _starts_of(block)
        for drop, end in ends.items():
            if isinstance(end, ResidualDrop):  # which adds its own input to its branch
                branches.append(ResidualBranch(end, (end.m,), end.m))
            elif drop in starts:
                attention = getattr(block, "attn", None) if isinstance(block, (EvaBlock, EvaBlockPostNorm)) else None
                branches.append(ResidualBranch(end, starts[drop], end, attention))
            else:
                uncut.append(f"{name}.{drop}")
    return branches, uncut


def _starts_of(block: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """By drop path, for those that the block calls; empty for a block that is not known."""
    known = BY_BLOCK.get(f"{type(block).__module__.removeprefix('timm.models.')}.{type(block).__name__}", {})
    children = dict(block.named_children())
    found: dict[str, tuple[nn.Module, ...]] = {}
    for drop, starts in known.items():
        alternatives = [[children[name] for name in start.split("|") if name in children] for start in starts]
        found[drop] = tuple(modules[0] for modules in alternatives if modules)
    return found


BY_BLOCK = {
    block: {drop.strip(): starts.split() for drop, _, starts in (part.partition(":") for part in rule.split(","))}
    for rule, blocks in STARTS.items()
    for block in blocks.split()
}
