"""What export.py writes: a file of weights, a folder as on the Hugging Face hub, ONNX."""

from __future__ import annotations

import inspect
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save
from timm.models import parse_model_name, save_for_hf, split_model_name_tag
from torch import nn

import augsub
from engine import atomic
from engine.checkpoint import load, load_metadata
from engine.checkpoint_file import EXPORTED
from engine.config import (
    UNTRANSFORMED,
    Config,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    has_several_labels,
    sides,
)
from engine.config_file import to_yaml
from engine.data.transforms import normalisation
from engine.defaults import import_plugins
from engine.errors import InputError, RunError, input_errors, writing_errors
from engine.evaluation.run import checkpoint_of, saved_config
from engine.text import readable_name, to_json
from models.build import TIMM_KEYS, create_model, takes_image_size
from models.weights import load_weights, without_lora

SUFFIXES = (".safetensors", ".pt", ".pth")
OF_BUILDING = inspect.signature(timm.create_model).parameters  # files to read, ways to run: nothing of a model's shape
CARD = Path(__file__).with_name("model_card.md")
RECIPE = ("augsub", "data", "train", "optimizer", "schedule", "loss", "mixup", "transform", "ema")  # sections in it
# what timm's configuration of a model says of its pretrained weights: of others only the licence stays
OF_PRETRAINED = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description")
# A note in timm's configuration of a model
SEVERAL_LABELS = "several labels: the sigmoid of each logit is its class's probability"
TOLERANCE = 1e-3  # absolute, of ONNX's logits: kernels add in other orders


@dataclass(frozen=True)
class Exported:
    """A plain timm model in evaluation mode, with its weights.

    Attributes:
        name: its name in timm.
        arguments: what `timm.create_model` needs beside the name.
        config: that of the run.
        is_average: whether the weights are the averaged ones.
        state: all that the checkpoint holds.
    """

    model: nn.Module
    name: str
    arguments: dict[str, Any]
    config: Config
    is_average: bool
    state: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model was trained for."""
        return self.arguments["in_chans"], *sides(self.config.data.image_size)


def export(checkpoint: Path, target: Path, ema: bool | None = None, overrides: Sequence[str] = ()) -> str:
    """Write the target, after timm's model has taken all weights; says which they are and how to load them.

    Args:
        checkpoint: of a run, or the run's folder.

    Raises:
        InputError: a checkpoint of something else, or another kind of target.
        RunError: the target cannot be written.
    """
    if target.suffix not in (*SUFFIXES, ".onnx", ""):
        raise InputError(f"{target}: allowed is a name that ends in .safetensors, .pt, .pth or .onnx, or a new folder")
    exported = load_exported(checkpoint_of(checkpoint), ema, overrides)
    write = {"": write_folder, ".onnx": write_onnx}.get(target.suffix, write_weights)
    loading = write(target, exported)
    return f"{loading}  # the averaged weights" if exported.is_average else loading


def load_exported(checkpoint: Path, ema: bool | None = None, overrides: Sequence[str] = ()) -> Exported:
    """The model in a checkpoint of a run.

    Args:
        ema: the averaged weights, or the trained ones; None: those whose accuracy chose the run's best checkpoint.
        overrides: `key=value` for its configuration, above all plugins.

    Raises:
        InputError: a checkpoint of something else, or without averaged weights.
    """
    state = load(checkpoint)
    if checkpoint.suffix == ".safetensors":
        state = {"model": state, "hooks": {}, **load_metadata(checkpoint)}
    if "model" not in state or "model_name" not in state:
        raise InputError(f"checkpoint {checkpoint} is not one of a run: it has {', '.join(map(str, [*state][:5]))}")
    config = saved_config(checkpoint, state["config"], overrides)
    if ema is None:
        ema = config.evaluation.metric.startswith("ema_") and "ema" in state["hooks"]
    if ema and "ema" not in state["hooks"]:
        raise InputError(f"--ema: checkpoint {checkpoint} has no averaged weights, its run had ema.enabled = false")
    weights, name = state["hooks"]["ema"]["model"] if ema else state["model"], state["model_name"]
    import_plugins(config.plugins)
    shape = {name: value for name, value in config.model.kwargs.items() if name not in OF_BUILDING}
    image_size, arguments = config.data.image_size, {**state["data"], **shape}
    with input_errors(f"checkpoint {checkpoint}"):
        model = create_model(name, image_size=image_size, **arguments)
        # the mask token is of sub-models alone
        plain = {name: tensor for name, tensor in without_lora(weights).items() if name != "mask_token"}
        load_weights(model, plain, checkpoint, complete=True)
    if takes_image_size(model):
        arguments["img_size"] = image_size
    if not config.model.pretrained:
        name = split_model_name_tag(name)[0]  # its tag is that of timm's weights
    return Exported(model.eval(), name, arguments, config, ema, state)


def write_weights(file: Path, exported: Exported) -> str:
    """One file that `timm.create_model` loads strictly."""
    weights = exported.model.state_dict()
    with writing_errors(file), atomic.new_content(file) as opened:
        if file.suffix == ".safetensors":
            opened.write(save(weights, metadata={"format": "pt", EXPORTED: _said(exported)}))
        else:
            torch.save(weights, opened)
    settings = "".join(f", {key}={value!r}" for key, value in exported.arguments.items())
    return f'timm.create_model("{exported.name}", checkpoint_path="{file}"{settings})'


def write_folder(folder: Path, exported: Exported) -> str:
    """Write model.safetensors, config.json and README.md; says how to load them.

    Raises:
        InputError: there is something of that name.
        RunError: the folder cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already; a folder to export to must be new")
    model, temporary = exported.model, atomic.temporary_name(folder)
    class_names = exported.state.get("class_names")
    labels = {"label_names": list(class_names)} if class_names else {}
    others = ("tag",) if exported.config.model.pretrained else OF_PRETRAINED
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in others}
    with writing_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        save_for_hf(
            model,
            str(temporary),
            model_config={"pretrained_cfg": _preprocessing(exported), **labels},
            model_args={key: value for key, value in exported.arguments.items() if key != "num_classes"},
            safe_serialization=True,
        )
        (temporary / "README.md").write_text(card(exported, readable_name(folder.name)), encoding="utf-8")
        temporary.rename(folder)
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'


def _preprocessing(exported: Exported) -> dict[str, Any]:
    """How images become the model's input, by timm's names; images that were used as they are stay so."""
    transform, (channels, *_) = exported.config.transform, exported.image_shape
    if exported.config.data.dataset in UNTRANSFORMED:
        own = {"mean": [0.0] * channels, "std": [1.0] * channels, "crop_pct": 1.0}
    else:
        mean, std = normalisation(exported.config)
        own = {**{timms: getattr(transform, key) for key, timms in TIMM_KEYS.items()}, "mean": mean, "std": std}
    if has_several_labels(exported.config):
        own["notes"] = [SEVERAL_LABELS]
    return {"input_size": exported.image_shape, **own}


def _said(exported: Exported) -> str:
    """What a file says of its model, as a checkpoint does: how it is built, how images become its input, its
    classes."""
    run, (channels, *_) = exported.config, exported.image_shape
    has_several = has_several_labels(run)
    own = replace(
        Config(),
        model=replace(ModelConfig(), name=exported.name, kwargs=run.model.kwargs),
        data=replace(run.data, root=None, table=None, in_chans=channels, cache=None, allow_mismatch=False),
        transform=run.transform,
        loss=replace(LossConfig(), name=run.loss.name, smoothing=0.0 if has_several else LossConfig.smoothing),
        evaluation=replace(EvaluationConfig(), metric="map" if has_several else EvaluationConfig.metric),
    )
    kept = {key: exported.state.get(key) for key in ("data", "class_names")}
    return to_json({"config": to_yaml(own), "model_name": exported.name, **kept})


def card(exported: Exported, title: str) -> str:
    """The model card."""
    config, state, prefix = exported.config, exported.state, "ema_" if exported.is_average else ""
    config = replace(config, data=replace(config.data, root=None))  # where the images lie is nobody else's affair
    is_local = parse_model_name(exported.name)[0] == "local-dir"  # so it names a folder of this machine
    sections = {section: getattr(config, section) for section in RECIPE}
    latest = {
        name.removeprefix(prefix): value
        for name, value in state["hooks"].get("evaluation", {}).get("latest", {}).items()
        if name.startswith("ema_") == exported.is_average
    }
    return Template(CARD.read_text()).substitute(
        title=title,
        name=exported.model.pretrained_cfg["architecture"] if is_local else exported.name,
        dataset=config.data.dataset,
        classes=exported.arguments["num_classes"],
        shape=" x ".join(map(str, exported.image_shape)),
        parameters=f"{sum(parameter.numel() for parameter in exported.model.parameters()) / 1e6:.2f}",
        iteration=f"{state['iteration']:,}",
        epochs=config.train.epochs,
        version=augsub.__version__,
        figures="\n".join(f"- {name}: {value:.4g}" for name, value in latest.items() if name != "images")
        or "- not evaluated before this checkpoint",
        recipe=OmegaConf.to_yaml(OmegaConf.create(OmegaConf.structured(sections))).strip(),
    )


def write_onnx(file: Path, exported: Exported) -> str:
    """Write the file for batches of any number of images; its logits were compared with the model's.

    Raises:
        InputError: a package is missing.
        RunError: the logits differ, or the file cannot be written.
    """
    with input_errors("ONNX needs more packages, pip install 'augsub[onnx]'"):
        import onnxruntime  # noqa: F401  (torch runs the program with it)
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    images = torch.randn(3, *exported.image_shape, generator=torch.Generator().manual_seed(0))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported.model,
            (images[:2],),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
        (found,), logits = program(images), exported.model(images)
    difference = (found - logits).abs().max().item()
    if not difference < TOLERANCE:
        raise RunError(f"{file}: onnxruntime's logits differ by {difference:.2g}, so nothing was written")
    program.model.metadata_props[EXPORTED] = _said(exported)
    with writing_errors(file):
        program.save(file)
    return (
        f'onnxruntime.InferenceSession("{file}").run(["logits"], {{"images": images}})  # images (B, C, H, W) float32; '
        f"logits within {difference:.0e} of timm's"
    )
