"""Where the records and the log of a run go."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import sys
import time
import uuid
from logging.handlers import MemoryHandler
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tqdm import tqdm

from engine import atomic
from engine.config import Config
from engine.config_file import leaves, to_yaml
from engine.errors import InputError, input_errors, writing_errors
from engine.run_folder import RunFolder
from engine.text import to_csv, to_json, with_nan

if TYPE_CHECKING:
    from torch import Tensor  # who only reads records does not wait for torch

LOGGER = logging.getLogger("engine")
Record = dict[str, float]
REMEDY = "; the last checkpoint is still there. Make room or give write access, then continue with --resume"
AXES = ("iteration", "epoch")  # of every record: when its other values were measured


class Writer:
    """Takes the records of a run; each has `iteration`, `epoch`, `lr` and what was measured."""

    def write(self, record: Record) -> None:
        """Write one record."""
        raise NotImplementedError

    def write_images(self, images: dict[str, Tensor]) -> None:
        """Write batches of images (B, 3, H, W) uint8 by their titles, where there is a place for them."""

    def close(self) -> None:
        """Nothing more will come."""


class LogWriter(Writer):
    """One line per record, with the time left at the average speed since the start of this process.

    Args:
        iteration, max_iterations: steps already done, and steps of the whole run.
    """

    SHOWN = ("main_loss", "sub_loss", "grad_norm", "eval_loss", "top1", "ema_top1", "map", "ema_map")

    def __init__(self, iteration: int, max_iterations: int) -> None:
        self._first, self._last = iteration, max_iterations
        self._started = time.monotonic()

    def write(self, record: Record) -> None:
        shown = [name for name in self.SHOWN if name in record]
        names = shown or [name for name in record if name not in (*AXES, "lr")]  # what a hook of one's own has found
        values = "  ".join(f"{name} {record[name]:.4g}" for name in names)
        costs = "  {images_per_second:.4g} images/s  {memory:.0f} MiB" if "memory" in record else ""
        # evaluations and checkpoints are part of the speed: there will be more of them
        seconds_per_step = (time.monotonic() - self._started) / (record["iteration"] - self._first)
        LOGGER.info(
            "epoch %.4g  iteration %d  %s  lr %.3g%s  %s left",
            record["epoch"],
            record["iteration"],
            values,
            record["lr"],
            costs.format_map(record),
            tqdm.format_interval(seconds_per_step * (self._last - record["iteration"])),
        )


class JSONLinesWriter(Writer):
    """metrics.jsonl: one JSON object per line, on the disk before the next step; other files are made of it.

    Records after `iteration` are left out first: a resumed run writes them again. So is what an interrupted write
    left of a line.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._path = path
        kept = [record for record in read_lines(path) if record["iteration"] <= iteration]
        with writing_errors(path, REMEDY):
            atomic.write_text(path, "".join(f"{to_json(record)}\n" for record in kept))
            self._file = open(path, "ab")  # noqa: SIM115  (closed in close)

    def write(self, record: Record) -> None:
        with writing_errors(self._path, REMEDY):
            self._file.write(f"{to_json(record)}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint must not survive a power failure that its records do not

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; a half-written last line is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(with_nan(json.loads(line)))
        except json.JSONDecodeError:
            break
    return records


class CSVWriter(Writer):
    """metrics.csv: a row per record; a value that a record does not have is empty.

    At the start, and when a record brings a new column, the file is made anew from metrics.jsonl: a resumed
    run has every row once, and rows from before know the new columns.

    Args:
        source: the metrics.jsonl, which has a record before it is written here.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self._path = path
        self._source = source
        self._rewrite()

    def write(self, record: Record) -> None:
        if record.keys() <= set(self._columns):
            with writing_errors(self._path, REMEDY), open(self._path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(record)
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        records = read_lines(self._source)
        self._columns = list(dict.fromkeys(name for record in records for name in record))  # as they came
        with writing_errors(self._path, REMEDY):
            atomic.write_text(self._path, to_csv(records, self._columns) if records else "")


class TensorBoardWriter(Writer):
    """TensorBoard events, with the configuration as text, and beside the results on the page HPARAMS.

    What an interrupted run wrote after `iteration` is hidden.
    """

    def __init__(self, config: Config, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed on one process only
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)
        self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", iteration)
        plain = {key: str(value) if isinstance(value, list | dict) else value for key, value in leaves(config).items()}
        results = dict.fromkeys((config.evaluation.metric, "main_loss"))  # beside which the page HPARAMS shows it
        for summary in hparams(plain, results):  # add_hparams would make a run of its own of them
            self._writer.file_writer.add_summary(summary)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in AXES:
                self._writer.add_scalar(name, value, record["iteration"])

    def write_images(self, images: dict[str, Tensor]) -> None:
        for title, batch in images.items():
            self._writer.add_images(title, batch)

    def close(self) -> None:
        self._writer.close()


class WandbWriter(Writer):
    """Records as steps of one W&B run; a resumed run goes on with it, and W&B drops the steps that it has already.

    WANDB_MODE=offline keeps everything in the run's folder.

    Raises:
        InputError: the package is missing, or W&B refuses to begin, most often for want of a login.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        wandb, project = require_wandb(config.log.wandb), config.log.wandb
        if not folder.wandb_id.exists():
            atomic.write_text(folder.wandb_id, uuid.uuid4().hex[:8])  # what makes it the same run again
        try:
            self._run = wandb.init(
                project=project,
                name=folder.path.name,
                dir=str(folder.path),
                id=folder.wandb_id.read_text(),
                resume="allow",
                config=leaves(config),
                allow_val_change=True,  # of what may change on resuming
                settings={"console": "off"},  # it would come between the progress bar and the terminal
            )
        except wandb.Error as error:
            raise InputError(
                f"log.wandb = {project}: W&B does not begin: {error}; `wandb login`, WANDB_MODE=offline, or null"
            ) from error

    def write(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if name != "iteration"}, step=record["iteration"])

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # hooks are closed after an error too
        self._run.finish(exit_code=int(failed))


def require_wandb(project: str) -> ModuleType:
    """The package; InputError if it is not installed."""
    with input_errors(f"log.wandb = {project}: the package cannot be imported, pip install wandb, or set it to null"):
        return importlib.import_module("wandb")


def open_writers(config: Config, folder: RunFolder, iteration: int, max_iterations: int) -> list[Writer]:
    """The writers of a run after `iteration` steps, in the order in which they get a record."""
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    if not has_tensorboard:
        LOGGER.warning("WARNING: tensorboard is not installed: no curves for it, those of metrics.jsonl stay")
    return [
        # first: if it does not begin, there is no metrics.jsonl yet, and the same command can be given again
        *([WandbWriter(config, folder)] if config.log.wandb is not None else []),
        LogWriter(iteration, max_iterations),
        JSONLinesWriter(folder.metrics, iteration),
        *([CSVWriter(folder.table, folder.metrics)] if config.log.csv else []),  # made of the file before it
        *([TensorBoardWriter(config, folder.path, iteration)] if has_tensorboard else []),
    ]


class LogFile(MemoryHandler):
    """log.txt: everything that is logged during a run, by timm too.

    It keeps what is logged until the run's folder exists, then appends it and all that follows to a file.

    A run that is refused for bad input thus leaves no folder behind, and one that starts loses no line.
    """

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)

    def open(self, path: Path) -> None:
        """Write to `path` from now on."""
        file = _File(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.setTarget(file)
        self.capacity = 1
        self.flush()

    def __enter__(self) -> LogFile:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger().removeHandler(self)
        if self.target is not None:
            self.target.close()
        self.close()


class _File(logging.FileHandler):
    """A file that is given up, with one line, when it cannot be written: a full disk must not fill the terminal too."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.emit = lambda record: None
        print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}; the log goes on here only", file=sys.stderr)
