"""Running statistics of BatchNorm: the same in all processes, and of frozen layers the same for ever."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.train_loop import HookBase


class SameBatchNormStatistics(HookBase):
    """Gives all processes the main one's running statistics before a step, as DistributedDataParallel does."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for layer in layers for buffer in layer.buffers()]

    def before_step(self) -> None:
        for buffer in self._statistics:
            dist.broadcast(buffer, src=0)


class FrozenStatistics(HookBase):
    """Lets frozen BatchNorm layers use their running statistics and keep them, in main model and sub-models.

    An evaluation puts all layers back into training mode, so this comes before every step.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers

    def before_step(self) -> None:
        for layer in self._layers:
            layer.eval()
