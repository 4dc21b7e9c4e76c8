"""How often a step makes the program wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def count_synchronisations(step: Callable[[], None]) -> int:
    """Waits in one step on a GPU, as CUDA itself reports them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
