"""How much memory a process has needed."""

from __future__ import annotations

import resource
import sys

import torch

MIB = 1024**2
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss, see getrusage(2)


def peak_memory(device: torch.device) -> float:
    """MiB at most so far: of a GPU's memory for tensors, on a CPU of the whole process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES / MIB
