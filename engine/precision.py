"""How a step computes: torch.compile, mixed precision, gradient scaling and clipping."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUDA_GRAPHS = "torch._inductor.cudagraph_trees"  # imported where something was compiled


def compile_forward(model: nn.Module, compile: bool | str, has_eager_draws: bool = False) -> None:
    """Compile a model's forward, in place.

    Args:
        compile: false, true, or one of torch's modes (`train.compile`).
        has_eager_draws: whether it draws the random numbers of a model that is not compiled.
    """
    if compile:
        if has_eager_draws:
            from torch._inductor import config  # here: it takes a second to import

            config.fallback_random = True
        model.compile(mode=None if compile is True else compile)


def begin_step() -> None:
    """From here on nobody needs what a compiled model returned before.

    CUDA graphs return memory of their own and write over it in the next step. Left alone they take every forward for
    one before which all backwards are done; the sub-model's is such, and learns from what the main model returned.
    """
    if CUDA_GRAPHS in sys.modules:
        torch.compiler.cudagraph_mark_step_begin()


class Precision:
    """Runs forwards in `amp` precision, backwards scaled if that is fp16, and steps the optimiser.

    Args:
        amp: off, bf16 or fp16.
        device: where the model is.
        clip_norm: largest global L2 norm of the unscaled gradient; None does not clip.
        loss_scale: of fp16, at the start.
        loss_scale_window: steps without overflow after which it doubles.
    """

    def __init__(
        self,
        amp: str,
        device: torch.device,
        clip_norm: float | None = None,
        loss_scale: float = 65536.0,
        loss_scale_window: int = 2000,
    ) -> None:
        self.amp = amp
        self.device = device
        self.clip_norm = clip_norm
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=loss_scale, growth_interval=loss_scale_window, enabled=amp == "fp16"
        )

    def autocast(self) -> torch.autocast:
        """Context of a forward."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.amp], enabled=self.amp != "off")

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss, scaled; outside autocast even when called inside a forward's context."""
        with torch.autocast(self.device.type, enabled=False):
            self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        """Unscale, clip, step, and empty the gradients; fp16 leaves a step with an infinite gradient out."""
        if self.clip_norm is not None:
            self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # empty from a run in another precision
            self.scaler.load_state_dict(state)
