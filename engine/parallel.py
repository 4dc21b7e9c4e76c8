"""One model on several processes: replicated (DistributedDataParallel) or sharded (FSDP2), both torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from engine.checkpoint import tree
from engine.config import DistributedConfig
from engine.distributed import Process
from engine.errors import InputError


def is_sharded(config: DistributedConfig, process: Process) -> bool:
    """Whether parameters, gradients and optimiser states are divided among the processes."""
    return config.strategy == "fsdp2" and process.world_size > 1


def replicate(model: nn.Module, process: Process) -> nn.Module:
    """The model under DistributedDataParallel, or itself in a single process."""
    if process.world_size == 1:
        return model
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def shard(model: nn.Module, units: Iterable[nn.Module], process: Process, reshard_after_forward: bool) -> nn.Module:
    """Divide the parameters among the processes, in place.

    Args:
        units: submodules whose parameters are gathered together, when they are needed.
        reshard_after_forward: free a unit's gathered parameters until its backward gathers them again.
    """
    mesh = dist.init_device_mesh(process.device.type, (process.world_size,))
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    # torch's default keeps the root's own parameters until backward, which begins with them
    return fully_shard(model, mesh=mesh, **({} if reshard_after_forward else {"reshard_after_forward": False}))


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


def shards_of(state: dict, optimizer: Optimizer) -> Callable[[tree.Path, torch.Size], Tensor | None]:
    """For the place of a tensor in a trainer's state and its size: the sharded tensor that it is to be like, or None.

    The states of a fresh optimiser are not there yet: those of a parameter's size are sharded like the parameter.
    """
    own, _ = tree.split(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(path: tree.Path, size: torch.Size) -> Tensor | None:
        tensor = parameters[path[2]] if path[:2] == ("optimizer", "state") else own.get(path)
        return tensor if isinstance(tensor, DTensor) and tensor.size() == size else None

    return like
