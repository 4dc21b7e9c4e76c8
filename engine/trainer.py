"""One training step of MaskSub, as in the paper's pseudo-code; everything around it is a hook."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim import Optimizer

from augsub import Objective, ObjectiveOutput
from engine.checkpoint import check_structure
from engine.data.loaders import DataLoaders
from engine.distributed import Process
from engine.errors import InputError
from engine.optim import optimizer_errors
from engine.precision import Precision, begin_step
from engine.seeding import derive_seed, seed_all
from engine.train_loop import TrainerBase


@dataclass(kw_only=True, eq=False)
class Trainer(TrainerBase):
    """Trains a model with an objective.

    Attributes:
        model: the model, wrapped for several processes if there are any.
        bare_model: the same model without wrapper, whose weights are saved.
        objective: gives the backward passes of a step.
        optimizer: steps once per iteration.
        data: this process's images, and how many steps they make.
        precision: mixed precision, scaling, clipping.
        process: this process among all.
        mix: Mixup or CutMix: (images, labels) to (images, soft labels); None leaves them.
        seed: all randomness of a step follows from it, the iteration and the micro-batch's number.
    """

    model: nn.Module
    bare_model: nn.Module
    objective: Objective
    optimizer: Optimizer
    data: DataLoaders
    precision: Precision
    process: Process
    mix: Mixup | None
    seed: int

    def __post_init__(self) -> None:
        super().__init__(self.data.max_iterations)
        self.means = RunningMeans(self.process)
        self.results: dict[str, float] = {}  # what hooks found out after this step, for the writers

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.iteration / self.data.iterations_per_epoch

    def train(self) -> None:
        with closing(self.data.train_from(self.iteration)) as self.batches:
            super().train()

    def run_step(self) -> None:
        begin_step()
        self.results = {}
        self.last_loss = torch.zeros((), device=self.process.device)
        self.objective.epoch = self.epoch
        accumulation = self.data.accumulation
        for micro_batch in range(accumulation):
            self._seed(micro_batch)
            images, targets = next(self.batches)
            if self.mix is not None:
                images, targets = self.mix(images, targets)
            with self.precision.autocast():
                output = self.objective.backward(
                    self.model,
                    images,
                    targets,
                    backward=self._backward,
                    sync=micro_batch == accumulation - 1,
                )
            self.means.add(_losses(output))
            self.last_loss += output.loss / accumulation
        with optimizer_errors():
            self.precision.step(self.optimizer)

    def _backward(self, loss: Tensor) -> None:
        self.precision.backward(loss / self.data.accumulation)
        self._call("after_backward")

    def _seed(self, micro_batch: int) -> None:
        """Mixing, masks and dropped paths follow from the micro-batch's number in its global batch alone:
        side by side in several processes or one after the other, the same ones come out."""
        number = micro_batch * self.process.world_size + self.process.rank
        seed_all(derive_seed(self.seed, number, self.iteration))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values. All processes must call it together."""
        return {
            "iteration": self.iteration,
            "model": self.bare_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.state_dict(),
            "means": self.means.state_dict(),
            "hooks": {hook.state_name: hook.state_dict() for hook in self.hooks if hook.state_name},
        }

    def load_state_dict(self, state: dict[str, Any], source: Path) -> None:
        """Take up the state of a run.

        Raises:
            InputError: the checkpoint `source` is of another model.
        """
        try:
            self.bare_model.load_state_dict(state["model"])
            self.iteration = state["iteration"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.precision.load_state_dict(state["scaler"])
            check_structure(self.means.state_dict(), state["means"], "means")
            self.means.load_state_dict(state["means"])
            for hook in self.hooks:
                if hook.state_name in state["hooks"]:
                    check_structure(hook.state_dict(), state["hooks"][hook.state_name], hook.state_name)
                    hook.load_state_dict(state["hooks"][hook.state_name])
                else:
                    hook.start_late()
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"checkpoint {source} does not fit this run: {type(error).__name__}: {error}") from error


class RunningMeans:
    """Means of named scalars since they were last read, over all processes."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value of each name, without waiting for the device."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
        self._count += 1

    def read(self) -> dict[str, float]:
        """The means, and start anew. All processes must call it together."""
        if not self._count:
            return {}
        means = torch.stack(list(self._sums.values())) / (self._count * self._process.world_size)
        result = dict(zip(self._sums, self._process.sum(means).tolist(), strict=True))
        self._sums, self._count = {}, 0
        return result

    def state_dict(self) -> dict[str, Any]:
        """The sums of every process, by rank. All processes must call it together."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return {"names": list(self._sums), "sums_by_rank": self._process.gather(values), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up this process's sums; with another number of processes, everybody their average."""
        by_rank = torch.tensor(state["sums_by_rank"], dtype=torch.float64)
        is_same = len(by_rank) == self._process.world_size
        sums = (by_rank[self._process.rank] if is_same else by_rank.mean(dim=0)).to(self._process.device)
        self._sums = dict(zip(state["names"], sums, strict=True))
        self._count = state["count"]


def _losses(output: ObjectiveOutput) -> dict[str, Tensor]:
    """Scalars of one step, by the names under which they are written."""
    losses = {"loss": output.loss, "main_loss": output.main_loss}
    if output.sub_losses:
        losses["sub_loss"] = sum(output.sub_losses) / len(output.sub_losses)
    if len(output.sub_losses) > 1:
        losses |= {f"sub_loss_{index}": loss for index, loss in enumerate(output.sub_losses)}
    return losses
