"""torch.compile for main model and sub-model, and what CUDA graphs must be told."""

from __future__ import annotations

import sys

import torch
from torch import nn

CUDA_GRAPHS = "torch._inductor.cudagraph_trees"  # imported where something was compiled


def compile_forward(model: nn.Module, compile: bool | str) -> None:
    """Compile a model's forward, in place.

    Args:
        compile: false, true, or one of torch's modes (`train.compile`).
    """
    if compile:
        model.compile(mode=None if compile is True else compile)


def begin_step() -> None:
    """From here on nobody needs what a compiled model returned before.

    CUDA graphs return memory of their own and write over it in the next step. Left alone they take every forward for
    one before which all backwards are done; the sub-model's is such, and learns from what the main model returned.
    """
    if CUDA_GRAPHS in sys.modules:
        torch.compiler.cudagraph_mark_step_begin()
