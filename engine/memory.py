"""How much memory a process has needed."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

MIB = 1024**2
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss, see getrusage(2)


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
