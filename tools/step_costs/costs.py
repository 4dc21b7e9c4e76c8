"""What a training step sends between processes and keeps in each of them, by arithmetic.

Collectives and sizes are those of torch's DistributedDataParallel and FSDP2 as `engine.distributed` sets them up;
`tools/step_costs/measure.py` counts the same in real processes. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from models.blocks import innermost_blocks

MIB = 1024**2
BUCKET_LIMITS = [MIB, 25 * MIB]  # DDP's defaults: the first bucket, and each one after it


@dataclass(frozen=True)
class Way:
    """How the processes share a step.

    Attributes:
        sharded: FSDP2; else DistributedDataParallel.
        once: gradients are reduced once per step; else after every branch of every micro-batch.
        reshard: FSDP2 frees gathered parameters after forward (`distributed.reshard_after_forward`).
    """

    title: str
    sharded: bool
    once: bool
    reshard: bool = False


DDP_EACH = Way("DDP, reduced after every branch", sharded=False, once=False)
DDP_ONCE = Way("DDP, reduced once", sharded=False, once=True)
FSDP_EACH = Way("FSDP2, reduced after every branch", sharded=True, once=False, reshard=True)
FSDP_ONCE = Way("FSDP2, reduced once", sharded=True, once=True, reshard=True)
FSDP_KEPT = Way("FSDP2, reduced once, reshard_after_forward=false", sharded=True, once=True, reshard=False)
WAYS = (DDP_EACH, DDP_ONCE, FSDP_EACH, FSDP_ONCE, FSDP_KEPT)


@dataclass(frozen=True)
class Step:
    """A step of one process.

    Attributes:
        model: patched, with frozen parameters frozen; may be on the meta device.
        branches: the main model and the sub-models.
        accumulation: micro-batches.
        states: tensors of the optimiser.
        averages: copies of the weights that are averages of them.
    """

    model: nn.Module
    processes: int
    branches: int = 2
    accumulation: int = 1
    states: Sequence[Tensor] = ()
    averages: int = 0

    @property
    def passes(self) -> int:
        """Forwards, and as many backwards."""
        return self.branches * self.accumulation


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step, and the size of what they work on (an all-gather's output, a reduce-scatter's input)."""

    all_reduces: int = 0
    reduce_scatters: int = 0
    all_gathers: int = 0
    broadcasts: int = 0
    reduced: int = 0
    gathered: int = 0
    broadcast: int = 0

    def sent(self, processes: int) -> int:
        """What each process sends with ring algorithms: an all-reduce is a reduce-scatter and an all-gather."""
        halves = (2 if self.all_reduces else 1) * self.reduced + self.gathered
        return halves * (processes - 1) // processes + self.broadcast


@dataclass(frozen=True)
class Memory:
    """What a process keeps, without activations and the buffers of collectives in flight."""

    parameters: int
    gradients: int
    states: int
    averages: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.states + self.averages


def traffic(way: Way, step: Step) -> Traffic:
    """Collectives of one step."""
    reductions = 1 if way.once else step.passes
    if not way.sharded:
        buffers = list(step.model.buffers())
        return Traffic(
            all_reduces=reductions * bucket_count(step.model),
            reduced=reductions * total_bytes(trained(step.model.parameters())),
            broadcasts=reductions
            * len({buffer.dtype for buffer in buffers}),  # before a forward whose backward reduces
            broadcast=reductions * total_bytes(buffers),
        )
    units = sharding_units(step.model)
    # for forward, and again for backward; the root's parameters stay in between
    gathered = (units + units[:-1] if way.reshard else units) * step.passes
    return Traffic(
        all_gathers=len(gathered),
        gathered=sum(padded_bytes(unit, step.processes) for unit in gathered),
        reduce_scatters=reductions * sum(bool(trained(unit)) for unit in units),
        reduced=reductions * sum(padded_bytes(trained(unit), step.processes) for unit in units),
    )


def memory(way: Way, step: Step) -> Memory:
    """What the process with the largest shards keeps when it keeps most."""
    parameters, buffers = list(step.model.parameters()), total_bytes(step.model.buffers())
    if not way.sharded:
        weights = total_bytes(parameters) + buffers
        gradients = total_bytes(trained(parameters))  # DDP's buckets: gradients are views of them
        return Memory(weights, gradients, total_bytes(step.states), step.averages * weights)
    units = sharding_units(step.model)
    weights = shard_bytes(parameters, step.processes) + buffers
    return Memory(
        parameters=weights + _gathered(way, [padded_bytes(unit, step.processes) for unit in units]),
        gradients=_sharded_gradients(way, step, units),
        states=shard_bytes(step.states, step.processes),
        averages=step.averages * weights,
    )


def _gathered(way: Way, units: Sequence[int]) -> int:
    """Of parameters at once: the root's and two blocks', the one in use and the next; without resharding all."""
    *blocks, root = units
    return root + sum(sorted(blocks)[-2:] if way.reshard else blocks)


def _sharded_gradients(way: Way, step: Step, units: Sequence[Sequence[Tensor]]) -> int:
    """FSDP2 keeps a gradient whole until it is reduced; reduced in the same backward, one unit at a time is whole."""
    if way.once and step.passes > 1:
        return total_bytes(trained(step.model.parameters()))
    largest = max(total_bytes(trained(unit)) for unit in units)
    return shard_bytes(trained(step.model.parameters()), step.processes) + largest


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
