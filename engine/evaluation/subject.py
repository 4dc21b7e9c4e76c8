"""What is evaluated: a run, a checkpoint, a file of weights, or a pretrained model of timm."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from engine.checkpoint import load_metadata
from engine.config import MODELS_TRANSFORM, Config
from engine.config_file import parse_config
from engine.errors import InputError
from engine.run_folder import CHECKPOINTS, RunFolder
from engine.sharded_checkpoint import PLAIN

LOGGER = logging.getLogger("engine")
WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")
# overrides that change no figure of a model
NO_EFFECT = ("plugins", "data.workers", "data.bad_files", "data.allow_mismatch", "evaluation.*", "distributed.*")
LONGEST = 120  # characters of a folder's name
# a model that no configuration of ours describes sees images as timm says
MODELS_OWN = f"""
data: {{image_size: null}}
transform: {{{", ".join(f"{key}: null" for key in MODELS_TRANSFORM)}}}
"""


@dataclass(frozen=True)
class Subject:
    """A model with weights.

    Attributes:
        config: the model, and how its images are read.
        checkpoint: file or folder of its weights; None: timm's pretrained ones.
        folder: for the results of its plain evaluation, if nobody says otherwise.
    """

    config: Config
    checkpoint: Path | None
    folder: Path


def find_subject(what: str, model_name: str | None, overrides: Sequence[str]) -> Subject:
    """What a command line means.

    A checkpoint brings its own configuration, without what a file must not say: which code runs (`plugins`), and that
    other data are meant (`data.allow_mismatch`).

    Args:
        what: a run's folder, a checkpoint, a file of weights, or the name of a timm model.
        model_name: the timm model of a file of weights that holds no configuration.
        overrides: `key=value` for the configuration.

    Raises:
        InputError: nothing of that name, a run without checkpoint, or weights of which the model is unknown.
    """
    path = Path(what)
    if model_name is not None:
        if not path.exists():
            raise InputError(f"{what}: no such file of weights for --model {model_name}")
        config = parse_config(MODELS_OWN, f"--model {model_name}", overrides)
        config.model.name = model_name
        return Subject(config, path, _results_of(path))
    if path.is_dir() and not (path / PLAIN).exists():
        path = _checkpoint_of(RunFolder(path))
    if path.exists():
        return Subject(_saved_config(path, overrides), path, _results_of(path))
    if path.suffix in WEIGHT_FILES or ("/" in what and ":" not in what):
        raise InputError(f"{what}: no such file or folder; a model of a hub is named hf-hub:USER/MODEL")
    config = parse_config(MODELS_OWN, what, overrides)
    config.model.name = what
    return Subject(config, None, Path("runs", "evaluation", _as_name(what)))


def folder_for(subject: Subject, asked: Sequence[str]) -> Path:
    """Where results go if nobody says otherwise: no evaluation replaces the results of another one.

    Args:
        asked: whatever a command asks for beside the plain evaluation; `key=value` that changes no result is left out.
    """
    keys = [word.partition("=")[0] for word in asked]
    changing = [word for word, key in zip(asked, keys, strict=True) if not any(fnmatch(key, one) for one in NO_EFFECT)]
    return subject.folder.with_name(_as_name("_".join([subject.folder.name, *sorted(changing)])))


def _as_name(text: str) -> str:
    """A text as the name of a folder; one that is too long, or has characters that no name should, gets a number."""
    name = re.sub(r"[^\w.,=+-]+", "_", text.strip("./"), flags=re.ASCII)
    if len(name) <= LONGEST and set(text) - set(name) <= {"/", ":"}:
        return name
    return f"{name[:LONGEST]}_{zlib.crc32(os.fsencode(text)):08x}"


def _checkpoint_of(run: RunFolder) -> Path:
    """The best checkpoint of a run, or the last one if none is called the best yet."""
    if not run.checkpoints.is_dir():
        raise InputError(f"{run.path}: neither the folder of a run nor a checkpoint")
    checkpoint = next((path for path in (run.best, run.last) if path.exists()), None)
    is_live = run.writer()
    if checkpoint is None:
        raise InputError(f"{run.path}: the run has no checkpoint{' yet, it is in progress' if is_live else ''}")
    if is_live:
        LOGGER.info("%s: the run is in progress; this is its %s checkpoint so far", run.path, checkpoint.stem)
    elif run.last.exists() and not checkpoint.samefile(run.last):
        LOGGER.info("%s: this is its best checkpoint; summary.json and compare_runs.py report the last one", run.path)
    return checkpoint


def _saved_config(checkpoint: Path, overrides: Sequence[str]) -> Config:
    text = load_metadata(checkpoint).get("config")
    if text is None:
        raise InputError(f"{checkpoint} holds no configuration: say which model these weights are of, --model NAME")
    return parse_config(
        text, f"the configuration in {checkpoint}", ["plugins=[]", "data.allow_mismatch=false", *overrides]
    )


def _results_of(checkpoint: Path) -> Path:
    """Inside the run that a checkpoint belongs to."""
    if checkpoint.parent.name == CHECKPOINTS:
        return checkpoint.parent.parent / "evaluation" / checkpoint.stem
    return Path("runs", "evaluation", _as_name(str(checkpoint)))
