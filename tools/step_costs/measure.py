"""Train steps in two real processes and count the collectives that torch issues."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

import augsub
from engine.command_line import leave
from engine.distributed import Process, local, replicate, shard
from models.blocks import innermost_blocks
from models.build import build_model
from tools.step_costs.costs import WAYS, Step, Traffic, Way, traffic

PROCESSES = 2
IMAGE_SIZE = 64
SMALL = {"num_classes": 7, "image_size": IMAGE_SIZE, "drop_path_rate": 0.0}  # seven do not divide into two shards
MODELS = {
    "ViT": {"name": "vit_tiny_patch16_224", "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3},
    "Swin": {
        "name": "swin_tiny_patch4_window7_224", "patch_size": 8, "window_size": 4, "embed_dim": 64, "depths": (2, 2),
        "num_heads": (2, 4),
    },
}  # fmt: skip
SUB_MODELS = (("masking", 0.5), ("masking", 0.3))
SETTINGS = list(product((1, 2), range(len(SUB_MODELS) + 1)))  # accumulation, sub-models
WARM_UP = 2  # steps of DDP: at the second one it makes its buckets anew
SIZES = {
    "c10d::allreduce_": ("all_reduces", "reduced"),
    "c10d::_reduce_scatter_base_": ("reduce_scatters", "reduced"),
    "c10d::_allgather_base_": ("all_gathers", "gathered"),
    "c10d::broadcast_": ("broadcasts", "broadcast"),
}  # torch's operator: the fields of Traffic for its number and its bytes


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    model: str
    way: Way
    accumulation: int
    sub_models: int


@dataclass(frozen=True)
class Measured:
    """What a step of a case was seen to do, and what it was computed to do.

    Attributes:
        parts: of the gradient that are reduced on their own: DDP's buckets, FSDP2's units.
        buckets: how often each of DDP's buckets was reduced; empty under FSDP2.
        gradient_norm: of the reduced gradient of all parameters.
    """

    case: Case
    seen: Traffic
    computed: Traffic
    parts: int
    buckets: list[int] = field(default_factory=list)
    gradient_norm: float = 0.0

    @property
    def reductions(self) -> float:
        """How often each gradient was reduced."""
        return (self.seen.all_reduces + self.seen.reduce_scatters) / self.parts


class Collectives(TorchDispatchMode):
    """Counts the collectives that this thread issues; on a CPU it also runs backward and all of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            number, nbytes = SIZES[func._schema.name]
            self.counts[number] += 1
            self.counts[nbytes] += _largest(args)
        return func(*args, **(kwargs or {}))

    @property
    def traffic(self) -> Traffic:
        """All so far."""
        return Traffic(**self.counts)


def _largest(args: tuple) -> int:
    """Bytes of the whole in a collective: of its list of tensors, or of the larger one of input and output."""
    return max(
        sum(tensor.nbytes for tensor in ([arg] if isinstance(arg, Tensor) else arg))
        for arg in args
        if isinstance(arg, Tensor) or (isinstance(arg, list) and arg and isinstance(arg[0], Tensor))
    )


def cases(settings: Sequence[tuple[int, int]] = SETTINGS) -> list[Case]:
    """All models and ways with these (micro-batches, sub-models).

    But one: the main model of a Swin does not use its mask token. After its own backward DDP waits for that
    gradient, and FSDP2 leaves it out.
    """
    return [
        Case(model, way, accumulation, sub_models)
        for model, way, (accumulation, sub_models) in product(MODELS, WAYS, settings)
        if way.once or model != "Swin"
    ]


def measure(which: Sequence[Case]) -> list[Measured]:
    """A step of every case in two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "measured"
        multiprocessing.spawn(_measure_all, (str(Path(folder) / "meet"), result, which), nprocs=PROCESSES)
        return torch.load(result, weights_only=False)  # written by this very program


def expect(case: Case) -> Measured:
    """What `measure` is to find, by arithmetic."""
    model, _ = _build(case)
    return _expected(case, model)


def _measure_all(rank: int, meeting: str, result: Path, which: Sequence[Case]) -> None:
    """All cases in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    process = Process(rank, PROCESSES, torch.device("cpu"))
    measured = [measure_case(case, process) for case in which]
    if process.is_main:
        torch.save(measured, result)
    dist.barrier()
    dist.destroy_process_group()
    leave(0, PROCESSES)


def measure_case(case: Case, process: Process) -> Measured:
    """One step of a case."""
    model, objective = _build(case)
    expected = _expected(case, model)
    reduced_buckets: list[int] = []
    wrapped = _wrap(model, case.way, process, reduced_buckets)
    for _ in range(0 if case.way.sharded else WARM_UP):
        _step(wrapped, objective, case, process)
    reduced_buckets.clear()
    with Collectives() as seen:
        _step(wrapped, objective, case, process)
    buckets = [count for _, count in sorted(Counter(reduced_buckets).items())]
    return replace(expected, seen=seen.traffic, buckets=buckets, gradient_norm=_gradient_norm(model, case.way))


def _build(case: Case) -> tuple[nn.Module, augsub.SubModelObjective]:
    torch.manual_seed(0)
    model = build_model(**MODELS[case.model], **SMALL)
    sub_models = [augsub.SubModel(*sub_model) for sub_model in SUB_MODELS[: case.sub_models]]
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), sub_models)
    objective.prepare(model)
    return model, objective


def _expected(case: Case, model: nn.Module) -> Measured:
    step = Step(model, PROCESSES, 1 + case.sub_models, case.accumulation)
    computed, once = traffic(case.way, step), traffic(replace(case.way, once=True), step)
    return Measured(case, computed, computed, parts=once.all_reduces + once.reduce_scatters)


def _wrap(model: nn.Module, way: Way, process: Process, reduced_buckets: list[int]) -> nn.Module:
    """As the engine wraps it; numbers of DDP's buckets are noted when they are reduced."""
    if way.sharded:
        return shard(model, innermost_blocks(model), process, way.reshard)

    def noting(group, bucket):  # DDP refuses annotations that are strings
        reduced_buckets.append(bucket.index())
        return allreduce_hook(group, bucket)

    wrapped = replicate(model, process)
    wrapped.register_comm_hook(None, noting)
    return wrapped


def _step(model: nn.Module, objective: augsub.SubModelObjective, case: Case, process: Process) -> None:
    """Gradients of one step; the optimiser's own collectives are not counted."""
    model.zero_grad()
    for micro_batch in range(case.accumulation):
        torch.manual_seed(micro_batch * process.world_size + process.rank)
        images, labels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([0, 3])
        if case.way.once:
            objective.backward(model, images, labels, sync=micro_batch == case.accumulation - 1)
            continue
        for branch in objective.branches(model, images, labels):  # what a loop without augsub does
            (branch.weight * branch.loss).backward()


def _gradient_norm(model: nn.Module, way: Way) -> float:
    squares = sum(local(p.grad).double().square().sum() for p in model.parameters() if p.grad is not None)
    if way.sharded:
        dist.all_reduce(squares)
    return float(squares.sqrt())
