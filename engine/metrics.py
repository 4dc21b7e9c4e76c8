"""What is measured during a run: averages of per-step values, memory."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.distributed import Process

MIB = 1024**2
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss, see getrusage(2)


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


def peak_memory(device: torch.device) -> float:
    """MiB at most so far: of a GPU's memory for tensors, on a CPU of the whole process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return peak_resident() / MIB


def peak_resident() -> int:
    """Bytes of this process in memory, at most so far.

    On Linux from /proc: what getrusage tells begins with what the process that started this one had.
    """
    status = Path("/proc/self/status")
    high_water = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if high_water is not None:
        return int(high_water[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES
