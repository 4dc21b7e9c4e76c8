"""Averages of per-step values that stay on the device until somebody reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.distributed import Process


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
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = {name: value.to(self._process.device) for name, value in state["sums"].items()}
        self._count = state["count"]
