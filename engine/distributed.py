"""The processes of a run, as torchrun starts them, and one model on several of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DistNetworkError, Store, TCPStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from engine.command_line import launched_processes
from engine.config import DistributedConfig
from engine.errors import InputError, Preempted, RunError, first_line

ADDRESS = "augsub/port"  # of the main process's store, in the agent's
PATIENCE = timedelta(seconds=2)  # for one attempt to connect, which a dead process's port refuses
PAUSE = 0.1  # seconds between attempts


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a GPU has, or this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # of the CPUs, for questions that must not wait for a GPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def min(self, values: Tensor) -> Tensor:
        """Smallest of `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; they must be picklable."""
        values = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of the main process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def agree(self, answer: bool, question: str) -> bool:
        """The answer that all processes give; InputError if they differ."""
        yes = int(self.sum(torch.tensor(int(answer), device=self.device)))
        if 0 < yes < self.world_size:
            raise InputError(f"{question} for {yes} of {self.world_size} processes only: all must share output_dir")
        return yes > 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


class Agreement:
    """Whether any process wants something: all of them learn it at the same step, and none waits for another.

    The answer comes one step late, when the question has long been answered.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._asked: tuple[Tensor, dist.Work] | None = None

    def ask(self, wanted: bool) -> bool:
        """Whether any process wanted it at the call before this one; in a single process, at this one."""
        if self._process.world_size == 1:
            return wanted
        before = self._asked
        votes = torch.tensor(int(wanted))
        self._asked = votes, dist.all_reduce(votes, group=self._process.control, async_op=True)
        if before is None:
            return False
        answer, work = before
        work.wait()
        return bool(answer)

    def finish(self) -> None:
        """Wait for the last question, which nobody will ask about. All processes call it together."""
        if self._asked is not None:
            self._asked[1].wait()


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[Process]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs) and leave them at the end.

    Raises:
        RunError: another process died, or did not take part in something for `timeout_minutes`.
    """
    world_size = launched_processes()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size == 1:
        yield Process(0, 1, device)
        return
    timeout = timedelta(minutes=timeout_minutes)
    try:
        _join(device, timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
        with _leaving_together(control):
            yield Process(dist.get_rank(), world_size, device, control)
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise RunError(
            f"lost contact: another process has ended, or did not take part for {timeout_minutes:g} minutes "
            f"(distributed.timeout_minutes): {first_line(error)}. Its own message, above or in its own log, says why. "
            "All processes must start again: --resume goes on from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_lost_contact(error: BaseException) -> bool:
    """Whether another process is gone, or did not take part in something."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's are plain, and name its files


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    shares_its_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    may_start_again = shares_its_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if not may_start_again:
        dist.init_process_group(backend, timeout=timeout)
        return
    agent, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = fresh_store(agent, os.environ["MASTER_ADDR"], rank, timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


@contextmanager
def _leaving_together(control: dist.ProcessGroup) -> Iterator[None]:
    """Whoever leaves early resets connections that others still read from: wait for all, unless there was an error."""
    try:
        yield
    except Preempted:
        dist.barrier(group=control)
        raise
    dist.barrier(group=control)


def fresh_store(agent: Store, host: str, rank: int, timeout: timedelta) -> Store:
    """Where the processes of one start of a run meet.

    torchrun's agent keeps one store over all restarts. What the dead processes wrote there, addresses above all, is
    still in it when the next ones look for each other (pytorch#135712), and its count of restarts differs between
    nodes. So the processes of each start meet in a store of their own, which the main process opens.

    Args:
        agent: lasts over all starts.
        host: of the main process.

    Raises:
        DistNetworkError: the main process did not open one within `timeout`.
    """
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        agent.set(ADDRESS, str(store.port))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store = TCPStore(host, int(agent.get(ADDRESS)), is_master=False, timeout=PATIENCE)
            store.set_timeout(timeout)
            return store
        except DistNetworkError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)


def is_sharded(config: DistributedConfig, process: Process) -> bool:
    """Whether parameters, gradients and optimiser states are divided among the processes."""
    return config.strategy == "fsdp2" and process.world_size > 1


def replicate(model: nn.Module, process: Process, reduce_dtype: str = "float32") -> nn.Module:
    """The model under DistributedDataParallel, or itself in a single process.

    Args:
        reduce_dtype: in which gradients travel, float32 or bf16.
    """
    if process.world_size == 1:
        return model
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    replicated = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    if reduce_dtype == "bf16":
        replicated.register_comm_hook(None, bf16_compress_hook)
    return replicated


def shard(
    model: nn.Module,
    units: Iterable[nn.Module],
    process: Process,
    reshard_after_forward: bool,
    reduce_dtype: str = "float32",
) -> nn.Module:
    """Divide the parameters among the processes, in place.

    Args:
        units: submodules whose parameters are gathered together, when they are needed.
        reshard_after_forward: free a unit's gathered parameters until its backward gathers them again.
        reduce_dtype: as for `replicate`.

    Raises:
        InputError: this torch cannot reduce in bf16.
    """
    mesh = dist.init_device_mesh(process.device.type, (process.world_size,))
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    # torch's default keeps the root's own parameters until backward, which begins with them
    sharded = fully_shard(model, mesh=mesh, **({} if reshard_after_forward else {"reshard_after_forward": False}))
    if reduce_dtype == "bf16":
        if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
            raise InputError(
                f"distributed.reduce_dtype = bf16: torch {torch.__version__} cannot with fsdp2, a newer one can"
            )
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(HalfReduceScatter())
    return sharded


class HalfReduceScatter:
    """FSDP2's reduce-scatter of float32, which travels as bf16.

    MixedPrecisionPolicy(reduce_dtype) would add up the branches' gradients in bf16 as well, and refuse parameters that
    have a gradient from the last branch alone, as a mask token.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Reduce the input of all processes, each keeps its part."""
        received = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        reduce_scatter = getattr(
            dist, "reduce_scatter_single", dist.reduce_scatter_tensor
        )  # its name before torch 2.14
        reduce_scatter(received, input_tensor.bfloat16(), op=op, group=group)
        output_tensor.copy_(received)


def synchronise_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """The model with BatchNorm over the images of all processes; as it is in a single process.

    Raises:
        InputError: torch has synchronised BatchNorm for GPUs only.
    """
    if process.world_size == 1:
        return model
    if process.device.type != "cuda":
        raise InputError("distributed.sync_batchnorm: torch synchronises BatchNorm on GPUs only; set it to false")
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)
