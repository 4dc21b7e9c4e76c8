"""Hooks that tell what happens: evaluation, records, pictures, progress, the report at the end, a profile."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine import atomic
from engine.figure import draw_curves
from engine.json_text import to_json
from engine.metrics import peak_memory
from engine.run_folder import RunFolder
from engine.table import text_table
from engine.train_loop import HookBase
from engine.writers import Record, Writer, read_lines

LOGGER = logging.getLogger("engine")


class Evaluation(HookBase):
    """Evaluates every `period` epochs and after the last step.

    Args:
        evaluations: prefix of the metric names (``""``, ``"ema_"``) to what evaluates those weights.
        period: iterations between evaluations.
        metric: the metric of which the best value is kept.
    """

    state_name = "evaluation"

    def __init__(self, evaluations: dict[str, Callable[[], dict[str, float]]], period: int, metric: str) -> None:
        self._evaluations = evaluations
        self._period = period
        self._metric = metric
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    @property
    def is_new_best(self) -> bool:
        """Whether the weights of this very step are the best so far."""
        return self.best.get("iteration") == self.trainer.iteration

    def after_step(self) -> None:
        iteration = self.trainer.iteration
        if iteration % self._period and not self.trainer.is_last:
            return
        self.latest = {
            prefix + name: value for prefix, run in self._evaluations.items() for name, value in run().items()
        }
        self.trainer.results |= self.latest
        if self.latest[self._metric] > self.best.get("value", float("-inf")):
            self.best = {"iteration": iteration, "epoch": self.trainer.epoch, "value": self.latest[self._metric]}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("best", "latest"):
            if not all(isinstance(value, int | float) for value in state[name].values()):
                raise ValueError(f"evaluation.{name} = {state[name]} is more than numbers")
        if state["best"] and not state["best"].keys() >= {"iteration", "epoch", "value"}:
            raise ValueError(f"evaluation.best = {state['best']} is not complete")
        self.best, self.latest = state["best"], state["latest"]


class WriteRecords(HookBase):
    """Writes a record every `period` iterations, and whenever there are results of an evaluation.

    Attributes:
        latest: the newest record, in every process; None before the first one.

    Args:
        open_writers: makes the writers at the start of training, given the iterations already done.
        period: iterations between records.
        global_batch: images per iteration, for the throughput.
    """

    def __init__(self, open_writers: Callable[[int], Sequence[Writer]], period: int, global_batch: int) -> None:
        self._open_writers = open_writers
        self._period = period
        self._global_batch = global_batch
        self._writers: Sequence[Writer] = ()
        self.latest: Record | None = None

    def before_train(self) -> None:
        self._writers = self._open_writers(self.trainer.iteration)
        self._start_interval()

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.iteration % self._period and not trainer.is_last and not trainer.results:
            return
        means = trainer.means.read()
        seconds = time.perf_counter() - self._since
        self.latest = {
            "iteration": trainer.iteration,
            "epoch": trainer.epoch,
            "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
            **means,
            "images_per_second": self._global_batch * (trainer.iteration - self._first_iteration) / seconds,
            "memory": peak_memory(trainer.process.device),
            **trainer.results,
        }
        for writer in self._writers:
            writer.write(self.latest)
        self._start_interval()

    def write_images(self, images: dict[str, Tensor]) -> None:
        """Hand batches of images (B, 3, H, W) uint8, by their titles, to the writers."""
        for writer in self._writers:
            writer.write_images(images)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def _start_interval(self) -> None:
        self._since = time.perf_counter()
        self._first_iteration = self.trainer.iteration


SHOWN = 8  # images


class SubModelPictures(HookBase):
    """Hands pictures of a few held-out images to the writers, before the first step of a run.

    Args:
        draw: pictures (B, 3, H, W) uint8 by title, from images (B, C, H, W).
        writing: has the writers.
    """

    def __init__(self, draw: Callable[[Tensor], dict[str, Tensor]], writing: WriteRecords) -> None:
        self._draw = draw
        self._writing = writing

    def before_train(self) -> None:
        if self.trainer.iteration == 0:
            self._writing.write_images(self._draw(self.trainer.data.held_out.examples(SHOWN)))


LAYOUT = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # and what a record says, in 80 columns


class ProgressBar(HookBase):
    """Shows steps and time left, and what the latest record says; nothing where standard error is no terminal.

    Args:
        writing: has the records; their values are on the CPU already, so that no step waits for the device.
    """

    def __init__(self, writing: WriteRecords) -> None:
        self._writing = writing
        self._shown: Record | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        columns, lines = shutil.get_terminal_size()  # 80 x 24 where a terminal tells no size; tqdm would show nothing
        self._stack = ExitStack()
        self._stack.enter_context(logging_redirect_tqdm())
        self._bar = self._stack.enter_context(
            tqdm(
                total=trainer.max_iterations,
                initial=trainer.iteration,
                bar_format=LAYOUT,
                smoothing=0,  # time left at the average speed: pauses for evaluation are part of it
                disable=None,
                leave=False,
                ncols=columns - 1,
                nrows=lines,
            )
        )

    def after_step(self) -> None:
        latest = self._writing.latest
        if latest is not self._shown:
            self._shown = latest
            self._bar.set_postfix_str(_in_short(latest), refresh=False)
        self._bar.update()

    def close(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()


def _in_short(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}, lr {record['lr']:.2g}, {record['images_per_second']:.0f} images/s, "
        f"{record['memory']:.0f} MiB"
    )


class Report(HookBase):
    """Writes summary.json and curves.png and prints the table, after the last step.

    Args:
        facts: more rows of the table, name and value; a resumed run keeps those of its start.
        bad_files: as many as were skipped.
    """

    state_name = "report"

    def __init__(
        self,
        folder: RunFolder,
        evaluation: Evaluation,
        title: str,
        facts: Sequence[tuple[str, str]] = (),
        bad_files: Sized = (),
    ) -> None:
        self._folder = folder
        self._evaluation = evaluation
        self._title = title
        self._facts = facts
        self._bad_files = bad_files
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def before_train(self) -> None:
        self._started = time.monotonic()

    def after_train(self) -> None:
        records = read_lines(self._folder.metrics)
        summary = self._summary(records[-1] if records else {})
        atomic.write_text(self._folder.summary, f"{to_json(summary, indent=2)}\n")
        draw_curves(records, self._title, self._folder.curves)
        LOGGER.info("\n%s\n%s", self._title, text_table(self._rows(summary)))

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "facts": [list(fact) for fact in self._facts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds_before = state["seconds"]
        self._facts = [tuple(fact) for fact in state["facts"]]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _summary(self, last_record: dict[str, float]) -> dict[str, Any]:
        losses = {name: value for name, value in last_record.items() if name.endswith("loss") or "sub_loss" in name}
        best = {f"best_{name}": value for name, value in self._evaluation.best.items()}
        return {
            **losses,
            **self._evaluation.latest,
            **best,
            "iterations": self.trainer.iteration,
            "epochs": self.trainer.epoch,
            "seconds": self._seconds(),
            "bad_files": len(self._bad_files),
        }

    def _rows(self, summary: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [
            ("main loss", f"{summary['main_loss']:.4f}"),
            ("sub loss", f"{summary['sub_loss']:.4f}" if "sub_loss" in summary else "no sub-model"),
            ("held-out top-1", f"{summary['top1']:.2f} % of {summary['images']} images"),
            ("held-out top-5", f"{summary['top5']:.2f} %"),
        ]
        if "ema_top1" in summary:
            rows.append(("held-out top-1, EMA", f"{summary['ema_top1']:.2f} %"))
        skipped = [("bad files skipped", f"{summary['bad_files']} (named in {self._folder.log.name})")]
        return [
            *rows,
            ("best", f"{summary['best_value']:.2f} % after epoch {summary['best_epoch']:.4g}"),
            *self._facts,
            *(skipped if summary["bad_files"] else []),
            ("trained for", f"{summary['epochs']:.4g} epochs, {summary['iterations']} iterations"),
            ("time", f"{summary['seconds']:.0f} s"),
            ("results", str(self._folder.path)),
        ]


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
