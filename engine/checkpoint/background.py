"""Writing in a thread of its own, from a copy in memory, while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from engine.checkpoint import tree


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state on the CPU, which later training steps do not change."""

    def copied(path: tree.Path, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    tensors, plain = tree.split(state)
    return tree.join({path: copied(path, tensor) for path, tensor in tensors.items()}, copy.deepcopy(plain))


class Background:
    """Runs one job at a time; the error of a job is raised where the next one is asked for, or waited for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: Future | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Run a job when the one before it has ended."""
        self.wait()
        self._job = self._thread.submit(job, *args)

    def wait(self) -> None:
        """Until the last job has ended; raises its error, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def check(self) -> None:
        """Raise the error of the last job if it has ended, without waiting."""
        if self._job is not None and self._job.done():
            self.wait()
