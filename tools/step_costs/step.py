"""A training step of a configuration without its weights: model and optimiser states on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import Config
from engine.data import DataSource
from engine.data.batch_sizes import accumulation_for
from engine.defaults import build_model_optimizer, build_objective
from engine.distributed import Process
from engine.errors import InputError, input_errors
from engine.run_model import build_run_model
from tools.step_costs.costs import Step


class NeedsValuesError(InputError):
    """An optimiser looks at the values of tensors, so that its states cannot be had on the meta device."""


def build_step(config: Config, source: DataSource, processes: int, with_states: bool = True) -> Step:
    """A step of a complete configuration in each of the processes, on the meta device.

    Raises:
        NeedsValuesError: the optimiser does not step there; `with_states=False` leaves its states out.
    """
    one = Process(0, 1, torch.device("cpu"))
    with torch.device("meta"):
        model = build_run_model(config, source, one, is_resumed=True)  # without the weights that it starts from
    objective = build_objective(config, torch.nn.CrossEntropyLoss())
    with input_errors("augsub.sub_models"):
        objective.prepare(model)
    return Step(
        model=model,
        processes=processes,
        branches=1 + len(objective.sub_models),
        accumulation=accumulation_for(config.train, processes),
        states=optimizer_states(config, model) if with_states else (),
        averages=int(config.ema.enabled),
    )


def optimizer_states(config: Config, model: torch.nn.Module) -> list[Tensor]:
    """The tensors that the optimiser has after a step of a model on the meta device."""
    optimizer = build_model_optimizer(config.optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        with input_errors("optimizer"):
            optimizer.step()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise NeedsValuesError(f"{config.optimizer.name} cannot step without values: {reason}") from error
    model.zero_grad(set_to_none=True)
    return [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
