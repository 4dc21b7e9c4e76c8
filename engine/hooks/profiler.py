"""What a few steps spend their time on."""

from __future__ import annotations

import logging
from pathlib import Path

from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from engine import atomic
from engine.train_loop import HookBase

LOGGER = logging.getLogger("engine")
SKIPPED, WARMUP, RECORDED = 3, 2, 5  # steps; the first ones choose kernels and fill caches, the profiler warms up too
NEEDED = SKIPPED + WARMUP + RECORDED
ROWS, NAME_WIDTH = 15, 40
PLAINLY = {"ProfilerStep*": "Python between operations"}


class Profiler(HookBase):
    """Records a few early steps of this process with their hooks, by torch's profiler; the steps after run without it.

    Writes a trace for chrome://tracing or https://ui.perfetto.dev and logs the operations that take longest.

    Args:
        trace: the JSON file to write.
    """

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self._profile: profile | None = None

    def before_train(self) -> None:
        self._on_gpu = self.trainer.process.device.type == "cuda"
        self._start = self.trainer.iteration
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=RECORDED, repeat=1),
        )
        self._profile.start()

    def after_step(self) -> None:
        if self._profile is None:
            return
        self._profile.step()
        if self.trainer.iteration - self._start == NEEDED:
            self._report(self._profile)
            self.close()

    def after_train(self) -> None:
        if self._profile is not None:
            LOGGER.warning(
                "train.profile: nothing was recorded, that takes %d steps in one go and the run had %d left",
                NEEDED,
                self.trainer.iteration - self._start,
            )

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _report(self, recorded: profile) -> None:
        LOGGER.info("%d steps profiled, trace in %s\n%s", RECORDED, self._trace, self._top_costs(recorded))
        temporary = atomic.temporary_name(self._trace)
        try:
            recorded.export_chrome_trace(str(temporary))
            atomic.put_in_place(temporary, self._trace)
        except (OSError, RuntimeError) as error:  # no reason to stop the run
            temporary.unlink(missing_ok=True)
            LOGGER.warning("WARNING: train.profile: %s cannot be written: %s", self._trace, error)

    def _top_costs(self, recorded: profile) -> str:
        """Operations by the time that they take themselves, without what they call."""
        attribute = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"  # microseconds
        # the time of a kernel is its caller's, an operation of the CPU
        operations = [event for event in recorded.key_averages() if event.device_type == DeviceType.CPU]
        costs = [(getattr(event, attribute) / RECORDED, event.count / RECORDED, event.key) for event in operations]
        total = sum(time for time, *_ in costs) or 1
        return tabulate(
            [
                (_shortened(name), f"{time / 1000:.3f}", f"{100 * time / total:.1f}", f"{calls:.4g}")
                for time, calls, name in sorted(costs, reverse=True)[:ROWS]
            ],
            headers=[f"on the {'GPU' if self._on_gpu else 'CPU'}", "ms per step", "%", "calls per step"],
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )


def _shortened(name: str) -> str:
    name = PLAINLY.get(name, name)
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"
