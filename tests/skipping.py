"""Skipped paths beside the same paths computed and multiplied by zero."""

from __future__ import annotations

import pytest
import torch
from timm.models.efficientvit_msra import ResidualDrop
from torch import Tensor, nn


def skipped_and_computed(model: nn.Module, images: Tensor, rate: float, *beside: object) -> tuple[Tensor, Tensor]:
    """What a patched model returns with skipped paths, and what with the same ones dropped after they are computed.

    Args:
        model: in evaluation mode; BatchNorm sees other images otherwise.
        images: (B, C, H, W).
        rate: of every branch; 1 / B or more.
        *beside: further augmentations, which draw the same in both.
    """
    draws: list[Tensor] = []
    batch, randperm = len(images), torch.randperm

    def draw(count: int, **kwargs) -> Tensor:
        draws.append(randperm(count, **kwargs))
        return draws[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", draw)
        torch.manual_seed(0)
        skipped = model(images, augsub=[*beside, {"name": "drop_path", "ratio": rate, "mode": "skip"}])
    assert draws

    def drop(module: nn.Module, args: object, branch: Tensor) -> Tensor:
        kept = draws.pop(0)[: max(1, int(batch * (1 - rate)))]
        scale = torch.zeros(batch, dtype=branch.dtype).index_fill(0, kept, batch / len(kept))
        return (branch.unflatten(0, (batch, -1)) * scale.view(batch, *[1] * branch.ndim)).flatten(0, 1)

    drop_paths = model._augsub.sites["drop_path"].modules
    ends = [module.m if isinstance(module, ResidualDrop) else module for module in drop_paths]
    hooks = [end.register_forward_hook(drop) for end in ends]
    torch.manual_seed(0)
    computed = model(images, augsub=[*beside]) if beside else model(images)
    for hook in hooks:
        hook.remove()
    assert not draws
    return skipped, computed


def can_skip(model: nn.Module) -> bool:
    """Whether all branches of a patched model can be cut out."""
    site = model._augsub.sites.get("drop_path")
    return site is not None and not site.uncut
