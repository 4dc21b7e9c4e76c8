"""What the processes of a step send each other and what each keeps in memory, by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config import Config
from engine.config_file import CONFIGS, load_config
from engine.data.loaders import accumulation_for
from engine.data.source import DataSource
from engine.defaults import build_model_optimizer, build_run_model, complete
from engine.distributed import Process
from engine.errors import InputError, first_line, input_errors
from engine.loss import build_objective
from engine.text import markdown_table, readable_size
from models.build import innermost_blocks
from tools.analysis import data_source

OF_A_MODEL = CONFIGS / "_base_" / "imagenet.yaml"  # what --model is trained with
HEADER = (
    "", "collectives per step", "sent by each GPU", "parameters", "gradients", "optimiser states", "EMA", "kept by each"
)  # fmt: skip
BUCKET_LIMITS = [2**20, 25 * 2**20]  # bytes, DDP's defaults: the first bucket, and each one after it


@dataclass(frozen=True)
class Strategy:
    """How processes share a step.

    Attributes:
        sharded: FSDP2; else DistributedDataParallel.
        once: gradients are reduced once per step; else after every branch of every micro-batch.
        reshard: FSDP2 frees gathered parameters after forward (`distributed.reshard_after_forward`).
        reduce_dtype: in which gradients travel (`distributed.reduce_dtype`).
    """

    sharded: bool
    once: bool
    reshard: bool = False
    reduce_dtype: str = "float32"

    def reduced(self, float32_bytes: int) -> int:
        """Bytes of gradients as they travel."""
        return float32_bytes // 2 if self.reduce_dtype == "bf16" else float32_bytes


STRATEGIES = {
    "DDP, reduced after every branch": Strategy(sharded=False, once=False),
    "DDP, reduced once": Strategy(sharded=False, once=True),
    "FSDP2, reduced after every branch": Strategy(sharded=True, once=False, reshard=True),
    "FSDP2, reduced once": Strategy(sharded=True, once=True, reshard=True),
    "FSDP2, reduced once, reshard_after_forward=false": Strategy(sharded=True, once=True),
    "DDP, reduced once in bf16": Strategy(sharded=False, once=True, reduce_dtype="bf16"),
    "FSDP2, reduced once in bf16": Strategy(sharded=True, once=True, reshard=True, reduce_dtype="bf16"),
}


@dataclass(frozen=True)
class Step:
    """A step of one process.

    Attributes:
        model: patched, with frozen parameters frozen; may be on the meta device.
        passes: forwards, and as many backwards: branches times micro-batches.
        states: tensors of the optimiser.
        averages: copies of the weights that are averages of them.
        uncounted: why the states are not known; empty if they are.
    """

    model: nn.Module
    processes: int
    passes: int = 2
    states: Sequence[Tensor] = ()
    averages: int = 0
    uncounted: str = ""


def build_step(config: Config, source: DataSource, processes: int) -> Step:
    """A step of a complete configuration, on the meta device."""
    with torch.device("meta"):
        model = build_run_model(config, source, Process(0, 1, torch.device("cpu")), is_resumed=True)
    objective = build_objective(config, nn.CrossEntropyLoss())
    with input_errors("augsub.sub_models"):
        objective.prepare(model)
    optimizer, uncounted = build_model_optimizer(config.optimizer, model), ""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        optimizer.step()
    except RuntimeError as error:
        uncounted = f"{config.optimizer.name} cannot step without values: {first_line(error)}"
    model.zero_grad()
    values = [] if uncounted else [value for state in optimizer.state.values() for value in state.values()]
    states = [value for value in values if isinstance(value, Tensor)]
    passes = objective.num_branches * accumulation_for(config.train, processes)
    return Step(model, processes, passes, states, int(config.ema.enabled), uncounted)


def traffic(strategy: Strategy, step: Step) -> dict[str, int]:
    """Numbers of a step's collectives, bytes of what they work on, and what each process has `sent`.

    Of an all-gather (`gathered`) that is the output, of a reduce-scatter (`reduced`) the input. Sent is by ring
    algorithms, of which an all-reduce is a reduce-scatter and an all-gather.
    """
    reductions, of_others = 1 if strategy.once else step.passes, step.processes - 1
    if not strategy.sharded:
        buffers, gradients = list(step.model.buffers()), trained(step.model.parameters())
        # buckets from the second step on, if gradients come in the reverse order of the parameters
        buckets = dist._compute_bucket_assignment_by_size(gradients[::-1], BUCKET_LIMITS)[0]
        reduced, broadcast = reductions * strategy.reduced(nbytes(gradients)), reductions * nbytes(buffers)
        return {
            "all_reduces": reductions * len(buckets),
            # before a forward whose backward reduces
            "broadcasts": reductions * len({buffer.dtype for buffer in buffers}),
            "reduced": reduced,
            "broadcast": broadcast,
            "sent": 2 * reduced * of_others // step.processes + broadcast,
        }
    units = sharding_units(step.model)
    # for forward, and again for backward; the root's parameters stay in between
    gathered = (units + units[:-1] if strategy.reshard else units) * step.passes
    reduced = reductions * sum(strategy.reduced(padded_bytes(trained(unit), step.processes)) for unit in units)
    gathered_bytes = sum(padded_bytes(unit, step.processes) for unit in gathered)
    return {
        "all_gathers": len(gathered),
        "reduce_scatters": reductions * sum(bool(trained(unit)) for unit in units),
        "reduced": reduced,
        "gathered": gathered_bytes,
        "sent": (reduced + gathered_bytes) * of_others // step.processes,
    }


def memory(strategy: Strategy, step: Step) -> dict[str, int]:
    """What the process with the largest shards keeps when it keeps most.

    Without activations and the buffers of collectives in flight.
    """
    parameters, buffers = list(step.model.parameters()), nbytes(step.model.buffers())
    gradients = nbytes(trained(parameters))  # whole until they are reduced; DDP's are views of its buckets
    weights, states, gathered = nbytes(parameters) + buffers, nbytes(step.states), 0
    if strategy.sharded:
        units = sharding_units(step.model)
        weights, states = shard_bytes(parameters, step.processes) + buffers, shard_bytes(step.states, step.processes)
        *blocks, root = [padded_bytes(unit, step.processes) for unit in units]
        # at once: the root's and two blocks', the one in use and the next; without resharding all
        gathered = root + sum(sorted(blocks)[-2:] if strategy.reshard else blocks)
        if not strategy.once or step.passes == 1:  # reduced in the same backward: one unit at a time is whole
            largest = max(nbytes(trained(unit)) for unit in units)
            gradients = shard_bytes(trained(parameters), step.processes) + largest
    averages = step.averages * weights
    return {"parameters": weights + gathered, "gradients": gradients, "states": states, "averages": averages}


def sharding_units(model: nn.Module) -> list[list[Tensor]]:
    """Parameters that FSDP2 gathers together: those of each block, then all others, the root's."""
    units = [list(block.parameters()) for block in innermost_blocks(model)]
    taken = {id(parameter) for unit in units for parameter in unit}
    root = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return [unit for unit in units if unit] + [root]


def trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that take a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]


def nbytes(tensors: Iterable[Tensor]) -> int:
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


def print_costs(config_file: str, model_name: str | None, processes: int, overrides: Sequence[str]) -> None:
    """Print what a step costs by each strategy.

    Args:
        config_file: of what is trained.
        model_name: any timm model to train instead, as `OF_A_MODEL` says.
    """
    model = [f"model.name={model_name}"] * bool(model_name)
    config = complete(load_config(OF_A_MODEL if model_name else config_file, [*model, *overrides]))
    step = build_step(config, data_source(config), processes)
    if step.uncounted:
        raise InputError(step.uncounted)
    rows = []
    for title, strategy in STRATEGIES.items():
        costs, kept = traffic(strategy, step), memory(strategy, step)
        numbers = {name: n for name, n in costs.items() if name.endswith("s") and n}
        named = [f"{n} {name.replace('_', '-').removesuffix('s' * (n == 1))}" for name, n in numbers.items()]
        rows.append(
            [title, " + ".join(named), *map(readable_size, (costs["sent"], *kept.values(), sum(kept.values())))]
        )
    parameters = sum(parameter.numel() for parameter in step.model.parameters()) / 1e6
    print(f"{config.model.name}, {parameters:.2f} M parameters, {processes} processes, {step.passes} passes per step\n")
    print(markdown_table(HEADER, rows))
