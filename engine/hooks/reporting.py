"""Hooks that tell what happens: evaluation, records, pictures, progress, the report at the end, a profile."""

from __future__ import annotations

import logging
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import augsub
from engine import atomic
from engine.config import Config
from engine.config_file import differences
from engine.evaluation.examples import SHOWN, draw_seen
from engine.evaluation.metrics import WEIGHTS, evaluate, metrics_for
from engine.figure import draw_curves, save
from engine.html_report import picture_line, plain, write_report
from engine.run_folder import RunFolder
from engine.text import markdown_table, text_table, to_json
from engine.train_loop import HookBase
from engine.writers import Record, Writer, open_writers, read_lines, require_wandb

LOGGER = logging.getLogger("engine")
SHOWN_FIGURES = {
    "top1": "top-1", "top5": "top-5", "map": "mAP", "f1_macro": "macro F1", "f1_micro": "micro F1",
    "ema_top1": "top-1, EMA", "ema_map": "mAP, EMA",
}  # fmt: skip
TOP = 5  # classes, of top-5
MIB = 1024**2
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss, see getrusage(2)


@dataclass
class Evaluation(HookBase):
    """Accuracy on held-out images, every `period` iterations and after the last step, and the best of it.

    An evaluation where `train.max_iters` stops a run in between counts for the best, not for patience and plateaus: the
    run goes on as one that was never stopped.
    """

    period: int
    length: int  # iterations of the whole run, whatever train.max_iters says
    metric: str  # of which the best value is kept
    patience: int | None = None  # evaluations without a better one after which the run ends
    average: nn.Module | None = None  # moving average of the weights, evaluated too; its results are called ema_...
    best: dict[str, float] = field(default_factory=dict)
    best_in_time: dict[str, float] = field(default_factory=dict)  # of those evaluations that are not a stop's
    without_better: int = 0  # of them, since the best one
    latest: dict[str, float] = field(default_factory=dict)
    state_name = "evaluation"

    @property
    def is_new_best(self) -> bool:
        """Whether the weights of this very step are the best so far."""
        return self.best.get("iteration") == self.trainer.iteration

    def before_train(self) -> None:
        self._end_if_it_gets_no_better()  # a run that had ended so, and is resumed

    def after_step(self) -> None:
        iteration = self.trainer.iteration
        is_in_time = iteration % self.period == 0 or iteration >= self.length
        if not is_in_time and not self.trainer.is_last:
            return
        self.latest = self._evaluate(self.trainer.bare_model, "")
        if self.average is not None:
            self.latest |= self._evaluate(self.average, "ema_")
        self.trainer.results |= self.latest
        found = {"iteration": iteration, "epoch": self.trainer.epoch, "value": self.latest[self.metric]}
        if self._is_better(found, self.best):
            self.best = found
        if is_in_time:
            is_better = self._is_better(found, self.best_in_time)
            self.best_in_time = found if is_better else self.best_in_time
            self.without_better = 0 if is_better else self.without_better + 1
        self._end_if_it_gets_no_better()

    def _is_better(self, found: dict[str, float], best: dict[str, float]) -> bool:
        sign = -1 if self.metric.endswith("loss") else 1
        return not best or sign * found["value"] > sign * best["value"]

    def _end_if_it_gets_no_better(self) -> None:
        if self.patience is not None and self.without_better >= self.patience and not self.trainer.is_last:
            self.trainer.max_iterations = self.trainer.iteration
            LOGGER.info(
                "no better %s since epoch %.4g: the run ends after %d evaluations without one (evaluation.patience)",
                self.metric,
                self.best_in_time["epoch"],
                self.without_better,
            )

    def _evaluate(self, model: nn.Module, prefix: str) -> dict[str, float]:
        trainer = self.trainer
        if trainer.process.world_size > 1:
            # each process has seen other images; of an average, those of the main process: they are what is saved
            distribute_bn(model, trainer.process.world_size, reduce=prefix != "ema_")
        name = f"the {WEIGHTS[prefix]} weights after iteration {trainer.iteration}"
        metrics = metrics_for(trainer.data.source, trainer.process.device, is_detailed=False)
        found = evaluate(model, trainer.data.held_out, trainer.precision, trainer.process, name, metrics)
        return {prefix + name: value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        other: dict[str, Any] = {} if self.best_in_time == self.best else {"best_in_time": self.best_in_time}
        other |= {"without_better": self.without_better} if self.without_better else {}
        return {"best": self.best, "latest": self.latest, **other}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = {"best_in_time": state["best"], "without_better": 0, **state}
        for name in ("best", "best_in_time", "latest"):
            if not all(isinstance(value, int | float) for value in state[name].values()):
                raise ValueError(f"evaluation.{name} = {state[name]} is more than numbers")
            if name != "latest" and state[name] and not state[name].keys() >= {"iteration", "epoch", "value"}:
                raise ValueError(f"evaluation.{name} = {state[name]} is not complete")
        self.best, self.best_in_time, self.latest = (state[name] for name in ("best", "best_in_time", "latest"))
        self.without_better = int(state["without_better"])


class WriteRecords(HookBase):
    """Hands the averages of every `period` iterations, and what other hooks found out, to the writers.

    Results of an evaluation in between make a record without averages. The main process alone has writers, opened when
    the run has its folder.

    Attributes:
        latest: the newest record with averages, in every process; None before the first one.
    """

    def __init__(self, config: Config, folder: RunFolder, period: int) -> None:
        if config.log.wandb is not None:
            require_wandb(config.log.wandb)  # now, before the run has a folder
        self._config, self._folder, self._period = config, folder, period
        self._writers: list[Writer] = []
        self.latest: Record | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        if trainer.process.is_main:
            self._writers = open_writers(self._config, self._folder, trainer.iteration, trainer.max_iterations)
        self._start_interval()

    def after_step(self) -> None:
        trainer = self.trainer
        is_whole = trainer.iteration % self._period == 0 or trainer.is_last
        if not is_whole and not trainer.results:
            return
        record: Record = {
            "iteration": trainer.iteration,
            "epoch": trainer.epoch,
            "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
        }
        if is_whole:
            images = self._config.train.global_batch * (trainer.iteration - self._first_iteration)
            record |= trainer.means.read()
            record["images_per_second"] = images / (time.perf_counter() - self._since)
            record["memory"] = peak_memory(trainer.process.device)
            self._start_interval()
        record |= trainer.results
        self.latest = record if is_whole else self.latest
        for writer in self._writers:
            writer.write(record)

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


@dataclass
class SubModelPictures(HookBase):
    """Pictures of what main model and sub-models see of a few held-out images; the writers get them at a run's start.

    All processes must have it if the model is sharded: it makes forwards.
    """

    config: Config
    writing: WriteRecords
    images: dict[str, Tensor] = field(default_factory=dict)  # (B, 3, H, W) uint8 by title

    def before_train(self) -> None:
        trainer = self.trainer
        augmentations: dict[str, augsub.SubModelAugmentation | None] = {"main model": None}
        for number, sub_model in enumerate(trainer.objective.sub_models):
            augmentations[f"sub-model {number}, {sub_model.augmentation}"] = sub_model.augmentation
        images, is_compiled = trainer.data.held_out.examples(SHOWN), bool(self.config.train.compile)
        self.images = draw_seen(trainer.bare_model, images, augmentations, self.config, is_compiled)
        if trainer.iteration == 0:
            self.writing.write_images(self.images)


@dataclass
class ProgressBar(HookBase):
    """Shows steps and time left, and what the latest record says; nothing where standard error is no terminal."""

    LAYOUT = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"  # and what a record says, in 80 columns
    RECORD = "loss {loss:.3f}, lr {lr:.2g}, {images_per_second:.0f} images/s, {memory:.0f} MiB"

    writing: WriteRecords  # has the records, whose values are on the CPU already: no step waits for the device

    def __post_init__(self) -> None:
        self._stack = ExitStack()

    def before_train(self) -> None:
        trainer = self.trainer
        columns, lines = shutil.get_terminal_size()  # 80 x 24 where a terminal tells no size; tqdm would show nothing
        self._stack.enter_context(logging_redirect_tqdm())
        self._bar = self._stack.enter_context(
            tqdm(
                total=trainer.max_iterations,
                initial=trainer.iteration,
                bar_format=self.LAYOUT,
                smoothing=0,  # time left at the average speed: pauses for evaluation are part of it
                disable=None,
                leave=False,
                ncols=columns - 1,
                nrows=lines,
            )
        )

    def after_step(self) -> None:
        if self.writing.latest is not None:
            self._bar.set_postfix_str(self.RECORD.format_map(self.writing.latest), refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._stack.close()


class Report(HookBase):
    """Writes summary.json, curves.png and report.html and prints the table, after the last step."""

    state_name = "report"

    def __init__(self, config: Config, folder: RunFolder, evaluation: Evaluation, pictures: SubModelPictures) -> None:
        self._folder = folder
        self._evaluation = evaluation
        self._pictures = pictures
        self._config = config
        self._title = f"{folder.path.name}: {config.model.name} on {config.data.dataset}"
        self._facts = _facts(config)  # a resumed run keeps those of its start
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def before_train(self) -> None:
        self._started = time.monotonic()

    def after_train(self) -> None:
        records = read_lines(self._folder.metrics)
        summary = self._summary(mean_losses(records, self.trainer.data.iterations_per_epoch))
        atomic.write_text(self._folder.summary, f"{to_json(summary, indent=2)}\n")
        curves = draw_curves(records, self._title)
        save(curves, self._folder.curves)
        rows = self._rows(summary)
        page = self._page(rows, [record for record in records if self._evaluation.metric in record])
        write_report(self._folder.report, page, {"curves": curves, **self._pictures.images})
        LOGGER.info("\n%s\n%s", self._title, text_table(rows))

    def _page(self, rows: Sequence[tuple[str, str]], evaluations: Sequence[Record]) -> str:
        """The report as Markdown."""
        settings = differences(self._config, Config())
        names = [name for name in evaluations[-1] if name == "epoch" or name in self._evaluation.latest]
        return "\n\n".join(
            [
                f"# {plain(self._title)}",
                markdown_table(["", ""], [[name, plain(value)] for name, value in rows]),
                "![Losses and accuracy over epochs](curves)",
                "## Evaluations",
                markdown_table(
                    names,
                    [[f"{record[name]:.5g}" if name in record else "" for name in names] for record in evaluations],
                ),
                "## What the models see",
                *map(picture_line, self._pictures.images),
                "## Configuration, where it is not the default",
                markdown_table(["key", "value"], [[f"`{key}`", plain(value)] for key, (value, _) in settings.items()]),
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "facts": [list(fact) for fact in self._facts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds_before = state["seconds"]
        self._facts = [tuple(fact) for fact in state["facts"]]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _summary(self, losses: dict[str, float]) -> dict[str, Any]:
        best = {f"best_{name}": value for name, value in self._evaluation.best.items()}
        return {
            **losses,
            **self._evaluation.latest,
            **best,
            "iterations": self.trainer.iteration,
            "epochs": self.trainer.epoch,
            "seconds": self._seconds(),
            "bad_files": len(self.trainer.data.bad_files),
            "fingerprints": self.trainer.data.source.facts["fingerprints"],
        }

    def _rows(self, summary: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [
            ("main loss", f"{summary['main_loss']:.4f}"),
            *([("sub loss", f"{summary['sub_loss']:.4f}")] if "sub_loss" in summary else []),
        ]
        few = self.trainer.data.source.num_classes <= TOP  # all of which are among the first ones
        shown = [(name, text) for name, text in SHOWN_FIGURES.items() if name in summary and not (few and "5" in name)]
        images = f" of {summary['images']} images"
        rows += [(f"held-out {text}", f"{summary[name]:.2f} %{images * (name == shown[0][0])}") for name, text in shown]
        best = summary["best_value"]
        best = f"{best:.4f}" if self._evaluation.metric.endswith("loss") else f"{best:.2f} %"
        skipped = [("bad files skipped", f"{summary['bad_files']} (named in {self._folder.log.name})")]
        return [
            *rows,
            *(
                [("mean over classes", f"{summary['balanced_accuracy']:.2f} %")]
                if "balanced_accuracy" in self._evaluation.metric
                else []
            ),
            ("best", f"{best} after epoch {summary['best_epoch']:.4g}"),
            *self._facts,
            *(skipped if summary["bad_files"] else []),
            ("trained for", f"{summary['epochs']:.4g} epochs, {summary['iterations']} iterations"),
            ("time", f"{summary['seconds']:.0f} s"),
            ("results", str(self._folder.path)),
        ]


def mean_losses(records: Sequence[Record], iterations: int) -> dict[str, float]:
    """Of the records that end in the last so many iterations the mean of each training loss, by their iterations."""
    averaged = [record for record in records if "loss" in record]
    ends = [0, *(int(record["iteration"]) for record in averaged)]
    own = [
        (record, end - start)
        for record, start, end in zip(averaged, ends, ends[1:], strict=False)
        if end > ends[-1] - iterations
    ]
    names = [
        name for name in (own[-1][0] if own else ()) if name == "loss" or name.startswith(("main_loss", "sub_loss"))
    ]
    return {name: sum(count * record[name] for record, count in own) / sum(count for _, count in own) for name in names}


def _facts(config: Config) -> list[tuple[str, str]]:
    """What belongs beside the results: where the weights came from, and what the paper reports."""
    model, paper = config.model, config.published
    start = model.checkpoint or ("timm's pretrained weights" if model.pretrained else "random weights")
    reported = {"MaskSub": paper.masksub, "baseline": paper.baseline}
    numbers = ", ".join(f"{way} {top1} %" for way, top1 in reported.items() if top1 is not None)
    return [("started from", start), *([("published, top-1", numbers)] if numbers else [])]


@dataclass
class Profiler(HookBase):
    """Records a few early steps of this process with their hooks, by torch's profiler; the steps after run without it.

    Writes a trace for chrome://tracing or https://ui.perfetto.dev and logs the operations that take longest.
    """

    SKIPPED, WARMUP, RECORDED = 3, 2, 5  # steps; the first ones choose kernels and fill caches
    NEEDED = SKIPPED + WARMUP + RECORDED
    ROWS, NAME_WIDTH = 15, 40  # of the table

    trace: Path  # the JSON file to write

    def __post_init__(self) -> None:
        self._profile: profile | None = None

    def before_train(self) -> None:
        self._on_gpu = self.trainer.process.device.type == "cuda"
        self._start = self.trainer.iteration
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(wait=self.SKIPPED, warmup=self.WARMUP, active=self.RECORDED, repeat=1),
        )
        self._profile.start()

    def after_step(self) -> None:
        if self._profile is None:
            return
        self._profile.step()
        if self.trainer.iteration - self._start == self.NEEDED:
            self._report(self._profile)
            self.close()

    def after_train(self) -> None:
        if self._profile is not None:
            LOGGER.warning(
                "train.profile: nothing was recorded, that takes %d steps in one go and the run had %d left",
                self.NEEDED,
                self.trainer.iteration - self._start,
            )

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _report(self, recorded: profile) -> None:
        table = recorded.key_averages().table(
            sort_by=f"self_{'device' if self._on_gpu else 'cpu'}_time_total",  # without what an operation calls
            row_limit=self.ROWS,
            max_name_column_width=self.NAME_WIDTH,
        )
        LOGGER.info("%d steps profiled, trace in %s\n%s", self.RECORDED, self.trace, table)
        try:
            recorded.export_chrome_trace(str(self.trace))
        except (OSError, RuntimeError) as error:  # no reason to stop the run
            LOGGER.warning("WARNING: train.profile: %s cannot be written: %s", self.trace, error)


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
