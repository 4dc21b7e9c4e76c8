"""What a training step sends between GPUs and keeps in each of them, by arithmetic: tools/scaling.py prints it.

Collectives and sizes are those of torch's DistributedDataParallel and FSDP2 as `engine/distributed.py` sets them up.
All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config import Config
from engine.data.loaders import accumulation_for
from engine.data.source import DataSource
from engine.defaults import build_model_optimizer, build_objective, build_run_model
from engine.distributed import Process
from engine.errors import InputError, input_errors
from engine.text import markdown_table, readable_size
from models.build import innermost_blocks

MIB = 1024**2
BUCKET_LIMITS = [MIB, 25 * MIB]  # DDP's defaults: the first bucket, and each one after it
HEADER = (
    "", "collectives per step", "sent by each GPU", "parameters", "gradients", "optimiser states", "EMA", "kept by each"
)  # fmt: skip


class NeedsValuesError(InputError):
    """An optimiser looks at the values of tensors, so that its states cannot be had on the meta device."""


@dataclass(frozen=True)
class Strategy:
    """How processes share a step.

    Attributes:
        sharded: FSDP2; else DistributedDataParallel.
        once: gradients are reduced once per step; else after every branch of every micro-batch.
        reshard: FSDP2 frees gathered parameters after forward (`distributed.reshard_after_forward`).
    """

    title: str
    sharded: bool
    once: bool
    reshard: bool = False


STRATEGIES = (
    Strategy("DDP, reduced after every branch", sharded=False, once=False),
    Strategy("DDP, reduced once", sharded=False, once=True),
    Strategy("FSDP2, reduced after every branch", sharded=True, once=False, reshard=True),
    Strategy("FSDP2, reduced once", sharded=True, once=True, reshard=True),
    Strategy("FSDP2, reduced once, reshard_after_forward=false", sharded=True, once=True),
)


@dataclass(frozen=True)
class Step:
    """A step of one process.

    Attributes:
        model: patched, with frozen parameters frozen; may be on the meta device.
        passes: forwards, and as many backwards: branches times micro-batches.
        states: tensors of the optimiser.
        averages: copies of the weights that are averages of them.
    """

    model: nn.Module
    processes: int
    passes: int = 2
    states: Sequence[Tensor] = ()
    averages: int = 0


def build_step(config: Config, source: DataSource, processes: int, with_states: bool = True) -> Step:
    """A step of a complete configuration, on the meta device.

    Raises:
        NeedsValuesError: the optimiser does not step there; `with_states=False` leaves its states out.
    """
    with torch.device("meta"):
        model = build_run_model(config, source, Process(0, 1, torch.device("cpu")), is_resumed=True)
    objective = build_objective(config, nn.CrossEntropyLoss())
    with input_errors("augsub.sub_models"):
        objective.prepare(model)
    branches = 1 + len(objective.sub_models)
    states = optimizer_states(config, model) if with_states else ()
    passes = branches * accumulation_for(config.train, processes)
    return Step(model, processes, passes, states, averages=int(config.ema.enabled))


def optimizer_states(config: Config, model: nn.Module) -> list[Tensor]:
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


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step, and bytes of what they work on (an all-gather's output, a reduce-scatter's input)."""

    all_reduces: int = 0
    reduce_scatters: int = 0
    all_gathers: int = 0
    broadcasts: int = 0
    reduced: int = 0
    gathered: int = 0
    broadcast: int = 0

    def sent(self, processes: int) -> int:
        """Bytes that each process sends with ring algorithms: an all-reduce is a reduce-scatter and an all-gather."""
        halves = (2 if self.all_reduces else 1) * self.reduced + self.gathered
        return halves * (processes - 1) // processes + self.broadcast

    def __str__(self) -> str:
        """The collectives: "98 all-reduces"."""
        names = ("all_gathers", "reduce_scatters", "all_reduces", "broadcasts")
        counts = {name.replace("_", "-"): getattr(self, name) for name in names}
        return " + ".join(f"{count} {name if count > 1 else name[:-1]}" for name, count in counts.items() if count)


@dataclass(frozen=True)
class Memory:
    """Bytes that a process keeps, without activations and the buffers of collectives in flight."""

    parameters: int
    gradients: int
    states: int
    averages: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.states + self.averages


def traffic(strategy: Strategy, step: Step) -> Traffic:
    """Collectives of one step."""
    reductions = 1 if strategy.once else step.passes
    if not strategy.sharded:
        buffers = list(step.model.buffers())  # broadcast before a forward whose backward reduces
        return Traffic(
            all_reduces=reductions * bucket_count(step.model),
            reduced=reductions * total_bytes(trained(step.model.parameters())),
            broadcasts=reductions * len({buffer.dtype for buffer in buffers}),
            broadcast=reductions * total_bytes(buffers),
        )
    units = sharding_units(step.model)
    # for forward, and again for backward; the root's parameters stay in between
    gathered = (units + units[:-1] if strategy.reshard else units) * step.passes
    return Traffic(
        all_gathers=len(gathered),
        gathered=sum(padded_bytes(unit, step.processes) for unit in gathered),
        reduce_scatters=reductions * sum(bool(trained(unit)) for unit in units),
        reduced=reductions * sum(padded_bytes(trained(unit), step.processes) for unit in units),
    )


def memory(strategy: Strategy, step: Step) -> Memory:
    """What the process with the largest shards keeps when it keeps most."""
    parameters, buffers = list(step.model.parameters()), total_bytes(step.model.buffers())
    gradients = total_bytes(trained(parameters))  # whole until they are reduced; DDP's are views of its buckets
    if not strategy.sharded:
        weights = total_bytes(parameters) + buffers
        return Memory(weights, gradients, total_bytes(step.states), step.averages * weights)
    units = sharding_units(step.model)
    weights = shard_bytes(parameters, step.processes) + buffers
    *blocks, root = [padded_bytes(unit, step.processes) for unit in units]
    # gathered at once: the root's and two blocks', the one in use and the next; without resharding all
    gathered = root + sum(sorted(blocks)[-2:] if strategy.reshard else blocks)
    if not strategy.once or step.passes == 1:  # reduced in the same backward: one unit at a time is whole
        largest = max(total_bytes(trained(unit)) for unit in units)
        gradients = shard_bytes(trained(parameters), step.processes) + largest
    return Memory(weights + gathered, gradients, shard_bytes(step.states, step.processes), step.averages * weights)


def sharding_units(model: nn.Module) -> list[list[Tensor]]:
    """Parameters that FSDP2 gathers together: those of each block, then all others, the root's."""
    units = [list(block.parameters()) for block in innermost_blocks(model)]
    taken = {id(parameter) for unit in units for parameter in unit}
    root = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return [unit for unit in units if unit] + [root]


def bucket_count(model: nn.Module) -> int:
    """Buckets of DDP from the second step on, if gradients come in the reverse order of the parameters."""
    gradients = trained(model.parameters())[::-1]
    return len(dist._compute_bucket_assignment_by_size(gradients, BUCKET_LIMITS)[0])


def trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that take a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def shard_bytes(tensors: Iterable[Tensor], processes: int) -> int:
    """Bytes of the first process's shards: FSDP2 cuts tensors along their first dimension, numbers stay whole."""
    return sum(
        -(-tensor.shape[0] // processes) * tensor[0].nbytes if tensor.ndim else tensor.nbytes for tensor in tensors
    )


def padded_bytes(tensors: Iterable[Tensor], processes: int) -> int:
    """Bytes in a collective: every process brings shards as large as the first one's."""
    return processes * shard_bytes(tensors, processes)


def table(step: Step) -> str:
    """A row for each strategy, as Markdown."""
    rows = []
    for strategy in STRATEGIES:
        costs, kept = traffic(strategy, step), memory(strategy, step)
        sizes = (costs.sent(step.processes), kept.parameters, kept.gradients, kept.states, kept.averages, kept.total)
        rows.append([strategy.title, str(costs), *map(readable_size, sizes)])
    return markdown_table(HEADER, rows)
