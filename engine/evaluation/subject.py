"""What is evaluated: a run, a checkpoint, a file of weights, or a pretrained model of timm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.reading import load_facts
from engine.checkpoint.sharded import PLAIN
from engine.config import MODELS_TRANSFORM, Config
from engine.config_file import parse_config
from engine.errors import InputError
from engine.run_folder import CHECKPOINTS, RunFolder

LOGGER = logging.getLogger("engine")
WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")
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
        folder: where its results go if nobody says otherwise.
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
    return Subject(config, None, Path("runs", "evaluation", what.replace("/", "_").replace(":", "_")))


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
    return checkpoint


def _saved_config(checkpoint: Path, overrides: Sequence[str]) -> Config:
    text = load_facts(checkpoint).get("config")
    if text is None:
        raise InputError(f"{checkpoint} holds no configuration: say which model these weights are of, --model NAME")
    return parse_config(
        text, f"the configuration in {checkpoint}", ["plugins=[]", "data.allow_mismatch=false", *overrides]
    )


def _results_of(checkpoint: Path) -> Path:
    """Inside the run that a checkpoint belongs to."""
    if checkpoint.parent.name == CHECKPOINTS:
        return checkpoint.parent.parent / "evaluation" / checkpoint.stem
    return Path("runs", "evaluation", checkpoint.stem)
