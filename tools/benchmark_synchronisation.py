"""How often a step makes the program wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal")


class ValueReads(TorchDispatchMode):
    """Counts the operators whose result the program, not the device, must know."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func._schema.name.removeprefix("aten::") in READS_VALUES
        return func(*args, **(kwargs or {}))


def count_synchronisations(step: Callable[[], None], device: torch.device) -> int:
    """Waits in one step: what CUDA itself reports; on a CPU, which has nothing to wait for, reads of values."""
    if device.type != "cuda":
        with ValueReads() as reads:
            step()
        return reads.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
