"""Reading a checkpoint, whether it is a file or a folder of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.checkpoint import file, sharded, tree
from engine.checkpoint.sharded import Like
from engine.errors import InputError


def load(path: Path, like: Like = lambda path, size: None) -> dict[str, Any]:
    """The content of a checkpoint, a file or a folder of shards; what would run code is refused.

    Args:
        like: for a tensor's path in the state and its size a sharded tensor, and this process gets its
            shard, or None for the whole tensor on the CPU.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain values.
    """
    if path.is_dir():
        return sharded.load(path, like)

    def shard(place: tree.Path, tensor: Tensor) -> Tensor:
        model = like(place, tensor.size())
        if not isinstance(model, DTensor):
            return tensor
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)

    return tree.map_tensors(shard, file.load(path))


def load_facts(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, without reading its tensors.

    Raises:
        InputError: as `load`.
    """
    return sharded.load_facts(path) if path.is_dir() else tree.split(file.load(path, mmap=True))[1]


def verify(path: Path) -> None:
    """Compare a checkpoint of a run with its checksums, and see that its plain values can be read.

    Raises:
        InputError: missing, damaged, or no checkpoint of a run.
    """
    (sharded if path.is_dir() else file).verify(path)
    iteration = load_facts(path).get("iteration")
    if not isinstance(iteration, int) or isinstance(iteration, bool) or iteration < 0:
        raise InputError(f"checkpoint {path} is not one of a run: it does not tell its iteration")


def load_strictly(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load a state dict strictly; a missing `mask_token` alone stays as it was initialised.

    Raises:
        InputError: names or shapes differ; the first few are listed.
    """
    own = model.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise InputError(f"checkpoint {source} holds no state dict as 'model'")
    problems = [f"{name} is missing" for name in own.keys() - weights.keys() - {"mask_token"}]
    problems += [f"{name} is unknown to the model" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"checkpoint {source} is of another model: {listed}{more}")
    model.load_state_dict(weights, strict=False)
