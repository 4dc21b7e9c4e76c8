"""The folder of a run: what lies where, and who may write into it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from engine import atomic
from engine.errors import InputError, writing_errors

LOGGER = logging.getLogger("engine")
CHECKPOINTS = "checkpoints"  # folder in that of a run


class RunFolder:
    """Paths of one run's results."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.table = self.path / "metrics.csv"
        self.wandb_id = self.path / "wandb_id"
        self.trace = self.path / "trace.json"
        self.curves = self.path / "curves.png"
        self.report = self.path / "report.html"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / CHECKPOINTS
        self.last = self.checkpoints / "last.pt"
        self.previous = self.checkpoints / "previous.pt"  # what `last` was before
        self.best = self.checkpoints / "best.pt"
        # of a dry run, beside the folder; a name that no wildcard for runs begins with
        self.plan = Path(os.path.normpath(self.path / ".." / f"plan_{self.path.resolve().name}.png"))

    def list_numbered(self) -> list[Path]:
        """Numbered checkpoints, oldest first."""
        numbered = [path for path in self.checkpoints.glob("iter_*.pt") if path.stem.removeprefix("iter_").isdecimal()]
        return sorted(numbered, key=lambda path: int(path.stem.removeprefix("iter_")))

    def refuse_if_taken(self) -> None:
        """Raise InputError if the folder holds a run's results, which a new run would overwrite."""
        if self.metrics.exists() or self.last.exists():
            raise InputError(
                f"output_dir = {self.path} holds a run already: continue it with --resume, or choose another output_dir"
            )

    @contextmanager
    def opened(self, config_yaml: str, is_resumed: bool) -> Iterator[None]:
        """Create the folder, keep others from writing into it, and save the complete configuration in it.

        Raises:
            InputError: another run is writing into the folder.
            RunError: it cannot be written.
        """
        with writing_errors(f"output_dir = {self.path}:"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")  # noqa: SIM115  (held until the end of the run)
        with lock:
            self._lock(lock)
            if not is_resumed:
                self.refuse_if_taken()  # again: another run may have come and gone since
            with writing_errors(f"output_dir = {self.path}:"):
                atomic.write_text(self.config, config_yaml)
            yield

    def _lock(self, lock: TextIO) -> None:
        try:
            # of this process alone: loading workers that outlive a killed one for seconds do not inherit it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            raise InputError(
                f"output_dir = {self.path}: another run is writing into it ({lock.read().strip() or 'unknown'}); "
                "stop that one, or choose another output_dir"
            ) from error
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s): see to it that no other run writes there", self.path, error)
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
