"""Stops a run whose loss is NaN or infinite, before anything of it is saved."""

from __future__ import annotations

import torch

from engine.distributed import local
from engine.errors import NonFiniteLossError
from engine.train_loop import HookBase

SMALLEST_SCALE = 1.0  # each overflow halves the scale; 17 in a row bring the usual 65536 below
NEVER = torch.iinfo(torch.int64).max
HOW_TO_GO_ON = (
    "; nothing was saved since. Lower optimizer.lr or set train.clip_norm, and continue from the last checkpoint "
    "with --resume"
)


class NaNGuard(HookBase):
    """Notes every loss without waiting for the device, and asks the device at `period`.

    With fp16 a single overflow is no error: the scaler leaves the step out and halves its scale.
    There the guard stops the run once the scale has collapsed.

    Args:
        period: iterations between two questions to the device; 1 costs nothing on a CPU.
    """

    def __init__(self, period: int) -> None:
        self._period = period

    def before_train(self) -> None:
        self._first_bad = torch.tensor(NEVER, device=self.trainer.process.device)

    def after_step(self) -> None:
        iteration = self.trainer.iteration
        bad = torch.where(self.trainer.last_loss.isfinite(), NEVER, iteration)
        self._first_bad = torch.minimum(self._first_bad, bad)
        if iteration % self._period == 0:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteLossError if a loss of any process since the start was not finite."""
        scaler = self.trainer.precision.scaler
        if scaler.is_enabled():
            if scaler.get_scale() < SMALLEST_SCALE:
                raise NonFiniteLossError(
                    f"the fp16 loss scale fell to {scaler.get_scale():.3g} at iteration {self.trainer.iteration}: "
                    "gradients overflow at every step; lower optimizer.lr or use train.amp=bf16"
                )
            return
        first_bad = int(self.trainer.process.min(self._first_bad))
        if first_bad != NEVER:
            raise NonFiniteLossError(f"the loss is not finite at iteration {first_bad}{HOW_TO_GO_ON}")

    def check_weights(self) -> None:
        """Raise NonFiniteLossError if this step's update ruined a parameter, whatever the loss was."""
        finite = [local(parameter).isfinite().all() for parameter in self.trainer.bare_model.parameters()]
        all_finite = torch.stack(finite).all().int()
        if not self.trainer.process.min(all_finite):
            raise NonFiniteLossError(
                f"a parameter is not finite after iteration {self.trainer.iteration}, though the loss was{HOW_TO_GO_ON}"
            )
