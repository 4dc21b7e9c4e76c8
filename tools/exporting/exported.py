"""The model in a run's checkpoint, with what others must know of it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

from engine.checkpoint import load
from engine.config import Config
from engine.config_file import parse_config
from engine.defaults import import_plugins
from engine.errors import InputError, input_errors
from models.build import create_model, takes_image_size

OF_BUILDING = inspect.signature(timm.create_model).parameters  # files to read, ways to run: nothing of a model's shape


@dataclass(frozen=True)
class Exported:
    """A plain timm model in evaluation mode, with its weights.

    Attributes:
        name: its name in timm.
        arguments: what `timm.create_model` needs beside the name.
        config: that of the run.
        class_names: by label; empty if the checkpoint does not know them.
        is_average: whether the weights are the averaged ones.
        iteration: steps of the run when the checkpoint was written.
        figures: what the run's last evaluation found, of the averaged weights if these are they.
    """

    model: nn.Module
    name: str
    arguments: dict[str, Any]
    config: Config
    class_names: tuple[str, ...]
    is_average: bool
    iteration: int
    figures: dict[str, float]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model was trained for."""
        return self.arguments["in_chans"], self.config.data.image_size, self.config.data.image_size

    def example(self, batch: int) -> Tensor:
        """Images (batch, C, H, W) of standard normal pixels, always the same ones."""
        return torch.randn(batch, *self.image_shape, generator=torch.Generator().manual_seed(0))


def load_exported(checkpoint: Path, ema: bool | None = None, plugins: Sequence[str] = ()) -> Exported:
    """The model in a checkpoint of a run.

    Args:
        ema: the averaged weights, or the trained ones; None: those whose accuracy chose the run's best checkpoint.
        plugins: modules to import for it; a file must not say which code runs.

    Raises:
        InputError: a checkpoint of something else, or without averaged weights.
    """
    state = load(checkpoint)
    _check_is_of_a_run(state, checkpoint)
    config = parse_config(state["config"], f"the configuration in {checkpoint}")
    if ema is None:
        ema = config.evaluation.metric == "ema_top1" and "ema" in state["hooks"]
    weights, name = _plain_weights(state, ema, checkpoint), state["model_name"]
    import_plugins(plugins)
    shape = {name: value for name, value in config.model.kwargs.items() if name not in OF_BUILDING}
    image_size, arguments = config.data.image_size, {**state["data"], **shape}
    hint = f", whose run had --plugins {' '.join(config.plugins)}" if config.plugins and not plugins else ""
    with input_errors(f"checkpoint {checkpoint}{hint}"):
        model = create_model(name, image_size=image_size, **arguments)
        model.load_state_dict(weights)
    if takes_image_size(name, image_size, **arguments):
        arguments["img_size"] = image_size
    latest = state["hooks"].get("evaluation", {}).get("latest", {})
    return Exported(
        model=model.eval(),
        name=name if config.model.pretrained else split_model_name_tag(name)[0],  # its tag is that of timm's weights
        arguments=arguments,
        config=config,
        class_names=tuple(state.get("class_names", ())),
        is_average=ema,
        iteration=state["iteration"],
        figures={key.removeprefix("ema_"): value for key, value in latest.items() if key.startswith("ema_") == ema},
    )


def _check_is_of_a_run(state: dict[str, Any], source: Path) -> None:
    if "model" not in state or "model_name" not in state:
        raise InputError(f"checkpoint {source} is not one of a run: it has {', '.join(map(str, [*state][:5]))}")


def _plain_weights(state: dict[str, Any], ema: bool, source: Path) -> dict[str, Tensor]:
    """The state dict of the timm model, without the mask token, which only sub-models use."""
    if ema and "ema" not in state["hooks"]:
        raise InputError(f"--ema: checkpoint {source} has no averaged weights, its run had ema.enabled = false")
    weights = state["hooks"]["ema"]["model"] if ema else state["model"]
    return {name: tensor.contiguous() for name, tensor in weights.items() if name != "mask_token"}
