"""Running statistics of BatchNorm, where no wrapper keeps them the same in all processes."""

from __future__ import annotations

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
