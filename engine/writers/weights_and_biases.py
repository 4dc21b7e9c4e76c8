"""Weights & Biases, for those who have it: curves and configuration on its server, or offline in the run's folder."""

from __future__ import annotations

import importlib
import sys
import uuid
from pathlib import Path
from types import ModuleType

from engine import atomic
from engine.errors import InputError
from engine.writers.writer import Record, Writer


class WandbWriter(Writer):
    """Records as steps of one W&B run; a resumed run goes on with it, and W&B drops the steps that it has already.

    Args:
        project: on the server of the user's account; WANDB_MODE=offline keeps everything in `folder`.
        id_file: what makes it the same run again.
        config_values: the configuration by keys with dots.

    Raises:
        InputError: the package is missing, or W&B refuses to begin, most often for want of a login.
    """

    def __init__(self, project: str, folder: Path, id_file: Path, config_values: dict[str, object]) -> None:
        wandb = require_wandb(project)
        if not id_file.exists():
            atomic.write_text(id_file, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                id=id_file.read_text(),
                resume="allow",
                config=config_values,
                allow_val_change=True,  # of what may change on resuming
                settings={"console": "off"},  # it would come between the progress bar and the terminal
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"log.wandb = {project}: W&B does not begin: {reason}; `wandb login`, WANDB_MODE=offline, or null"
            ) from error

    def write(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if name != "iteration"}, step=record["iteration"])

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # hooks are closed after an error too
        self._run.finish(exit_code=int(failed))


def require_wandb(project: str) -> ModuleType:
    """The package; InputError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            f"log.wandb = {project}: the package cannot be imported ({error}): pip install wandb, or set it to null"
        ) from error
