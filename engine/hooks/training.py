"""Hooks that belong to the training itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from engine.errors import NonFiniteLossError
from engine.hooks.reporting import Evaluation
from engine.optim import Schedule
from engine.train_loop import HookBase

LOGGER = logging.getLogger("engine")


@dataclass
class LearningRateSchedule(HookBase):
    """Sets the learning rate as a function of the iteration, or of the epoch; there is nothing to resume."""

    schedule: Schedule
    per_epoch: bool
    factor: float = 1.0  # which Plateau lowers

    def before_step(self) -> None:
        step = int(self.trainer.epoch) if self.per_epoch else self.trainer.iteration
        for group in self.trainer.optimizer.param_groups:
            rate = self.schedule(step)
            group["lr"] = max(self.factor * rate, min(rate, self.schedule.floor)) * group["lr_scale"]

    @property
    def warms_up(self) -> bool:
        """Whether the learning rate of the next step is still on its way up."""
        step = int(self.trainer.epoch) if self.per_epoch else self.trainer.iteration
        return step - self.schedule.lag < self.schedule.warmup


@dataclass
class Plateau(HookBase):
    """Lowers the learning rate where evaluations find nothing better: after `patience` of them, and so on, to `min_lr`.

    As a hook it comes after the evaluation.
    """

    learning_rate: LearningRateSchedule
    evaluation: Evaluation
    patience: int
    decay_rate: float
    state_name = "plateau"

    def after_step(self) -> None:
        evaluation, iteration = self.evaluation, self.trainer.iteration
        waited = evaluation.without_better
        is_due = iteration % evaluation.period == 0 and not self.learning_rate.warms_up
        if is_due and waited and waited % self.patience == 0:
            self.learning_rate.factor *= self.decay_rate

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.learning_rate.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learning_rate.factor = state["factor"]


@dataclass
class StopMixing(HookBase):
    """From `epoch` on the labels are still smoothed, but nothing is mixed."""

    mixup: Mixup
    epoch: int

    def before_step(self) -> None:
        self.mixup.mixup_enabled = self.trainer.epoch < self.epoch


class SameBatchNormStatistics(HookBase):
    """Gives all processes the main one's running statistics before a step, as DistributedDataParallel does.

    Those of an average too: a checkpoint has the main process's, and a sub-model may learn from it.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for layer in layers for buffer in layer.buffers()]

    def before_step(self) -> None:
        for buffer in self._statistics:
            dist.broadcast(buffer, src=0)


@dataclass
class FrozenStatistics(HookBase):
    """Lets frozen BatchNorm layers use their running statistics and keep them, in main model and sub-models.

    An evaluation puts all layers back into training mode, so this comes before every step.
    """

    layers: Sequence[nn.Module]

    def before_step(self) -> None:
        for layer in self.layers:
            layer.eval()


@dataclass
class ExponentialMovingAverage(HookBase):
    """Updates timm's ModelEmaV3 after every step."""

    ema: ModelEmaV3
    state_name = "ema"

    def after_step(self) -> None:
        self.ema.update(self.trainer.bare_model, step=self.trainer.iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.ema.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.module.load_state_dict(state["model"])

    def start_late(self) -> None:
        self.ema.set(self.trainer.bare_model)  # not from random weights


@dataclass
class GradientNorm(HookBase):
    """Records `grad_norm`, the global L2 norm before clipping, of the steps that are logged.

    At these and at the first step it also compares the branches, and warns once of each sub-model whose weighted
    gradient has more than `TOO_MANY` times the norm of the main model's. FSDP2 shows the gradient of the last branch
    only: nothing can be compared there.
    """

    TOO_MANY = 100  # times: a sub-model's gradient is otherwise below the main model's, as its target is close
    period: int  # iterations between records

    def __post_init__(self) -> None:
        self._warned: set[int] = set()  # numbers of sub-models

    def before_train(self) -> None:
        self._first = self.trainer.iteration + 1

    def before_step(self) -> None:
        upcoming = self.trainer.iteration + 1
        self._is_due = upcoming % self.period == 0 or upcoming == self._first
        self._norms: list[Tensor] = []  # of all that is accumulated, after each backward of this step
        self._scale = self.trainer.precision.scaler.get_scale() if self._is_due else 1.0

    def after_backward(self) -> None:
        if self._is_due:
            parameters = self.trainer.bare_model.parameters()
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._norms.append(norm.to(self.trainer.process.device))  # without gradients, under FSDP2, it is on the CPU

    def after_step(self) -> None:
        if not self._is_due:
            return
        norms = torch.stack(self._norms).tolist()
        if self.trainer.objective.computes_main:
            self._compare(norms[: 1 + len(self.trainer.objective.sub_models)])
        if self.trainer.iteration % self.period == 0 and math.isfinite(norms[-1]):  # fp16 overflows now and then
            self.trainer.results["grad_norm"] = norms[-1] / self._scale

    def _compare(self, norms: list[float]) -> None:
        """The main model's norm, then that of its sum with each sub-model's, one after the other."""
        main = norms[0]
        for number, (before, after) in enumerate(pairwise(norms)):
            times = (after - before) / main if main else 0
            if times > self.TOO_MANY and number not in self._warned and self.trainer.process.is_main:
                self._warned.add(number)
                LOGGER.warning(
                    "WARNING: at iteration %d the gradient of sub-model %d, %s, has %.2g times the norm of the main "
                    "model's: it drowns what the labels teach; use another mode or augmentation, or train.clip_norm",
                    self.trainer.iteration,
                    number,
                    self.trainer.objective.sub_models[number].augmentation,
                    times,
                )


@dataclass
class NaNGuard(HookBase):
    """Notes every loss without waiting for the device, and asks the device at `period`.

    With fp16 a single overflow is no error: the scaler leaves the step out and halves its scale.
    There the guard stops the run once the scale has collapsed.
    """

    SMALLEST_SCALE = 1.0  # each overflow halves the scale; 17 in a row bring the usual 65536 below
    NEVER = torch.iinfo(torch.int64).max
    HOW_TO_GO_ON = (
        "; nothing was saved since. Lower optimizer.lr or set train.clip_norm, and continue from the last checkpoint "
        "with --resume"
    )
    period: int  # iterations between two questions to the device; 1 costs nothing on a CPU

    def before_train(self) -> None:
        self._first_bad = torch.tensor(self.NEVER, device=self.trainer.process.device)

    def after_step(self) -> None:
        iteration = self.trainer.iteration
        bad = torch.where(self.trainer.last_loss.isfinite(), self.NEVER, iteration)
        self._first_bad = torch.minimum(self._first_bad, bad)
        if iteration % self.period == 0:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteLossError if a loss of any process since the start was not finite."""
        scaler = self.trainer.precision.scaler
        if scaler.is_enabled():
            if scaler.get_scale() < self.SMALLEST_SCALE:
                raise NonFiniteLossError(
                    f"the fp16 loss scale fell to {scaler.get_scale():.3g} at iteration {self.trainer.iteration}: "
                    "gradients overflow at every step; lower optimizer.lr or use train.amp=bf16"
                )
            return
        first_bad = int(self.trainer.process.min(self._first_bad))
        if first_bad != self.NEVER:
            raise NonFiniteLossError(f"the loss is not finite at iteration {first_bad}{self.HOW_TO_GO_ON}")

    def check_weights(self) -> None:
        """Raise NonFiniteLossError if this step's update ruined a parameter, whatever the loss was."""
        parameters = self.trainer.bare_model.parameters()
        shards = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters]
        finite = [shard.isfinite().all() for shard in shards]
        all_finite = torch.stack(finite).all().int()
        if not self.trainer.process.min(all_finite):
            raise NonFiniteLossError(
                f"a parameter is not finite after iteration {self.trainer.iteration}, though the loss was"
                + self.HOW_TO_GO_ON
            )
