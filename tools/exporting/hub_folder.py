"""A model as a folder in the layout of timm's models on the Hugging Face hub."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import OmegaConf
from timm.models import parse_model_name, save_for_hf

import augsub
from engine.atomic import temporary_name
from engine.config import UNTRANSFORMED
from engine.errors import InputError, writing_errors
from engine.paths import readable
from tools.exporting.exported import Exported

CARD = Path(__file__).with_name("model_card.md")
RECIPE = (
    "augsub",
    "data",
    "train",
    "optimizer",
    "schedule",
    "loss",
    "mixup",
    "transform",
    "ema",
)  # sections of the card
# what timm's configuration of a model says of its pretrained weights: of others only the licence stays
OF_PRETRAINED = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description")


def write_folder(folder: Path, exported: Exported) -> str:
    """Write model.safetensors, config.json and README.md; says how to load them.

    Raises:
        InputError: there is something of that name.
        RunError: the folder cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already; a folder to export to must be new")
    temporary = temporary_name(folder)
    with writing_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        _save(exported, temporary)
        (temporary / "README.md").write_text(card(exported, readable(folder.name)), encoding="utf-8")
        temporary.rename(folder)
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'


def _save(exported: Exported, folder: Path) -> None:
    arguments = {key: value for key, value in exported.arguments.items() if key != "num_classes"}
    labels = {"label_names": list(exported.class_names)} if exported.class_names else {}
    others = ("tag",) if exported.config.model.pretrained else OF_PRETRAINED
    exported.model.pretrained_cfg = {k: v for k, v in exported.model.pretrained_cfg.items() if k not in others}
    save_for_hf(
        exported.model,
        str(folder),
        model_config={"pretrained_cfg": _preprocessing(exported), **labels},
        model_args=arguments,
        safe_serialization=True,
    )


def _preprocessing(exported: Exported) -> dict[str, Any]:
    """How images become the model's input, by timm's names; images that were used as they are stay so."""
    transform, (channels, *_) = exported.config.transform, exported.image_shape
    preprocessing: dict[str, Any] = {"input_size": exported.image_shape}
    if exported.config.data.dataset in UNTRANSFORMED:
        return {**preprocessing, "mean": [0.0] * channels, "std": [1.0] * channels, "crop_pct": 1.0}
    return {
        **preprocessing,
        "mean": list(transform.mean),
        "std": list(transform.std),
        "crop_pct": transform.eval_crop,
        "crop_mode": transform.eval_crop_mode,
        "interpolation": transform.eval_interpolation,
    }


def card(exported: Exported, title: str) -> str:
    """The model card."""
    config, figures = exported.config, exported.figures
    config = replace(config, data=replace(config.data, root=None))  # where the images lie is nobody else's affair
    is_local = parse_model_name(exported.name)[0] == "local-dir"  # so it names a folder of this machine
    sections = {section: getattr(config, section) for section in RECIPE}
    measured = [f"- {name}: {value:.4g}" for name, value in figures.items() if name != "images"]
    return Template(CARD.read_text()).substitute(
        title=title,
        name=exported.model.pretrained_cfg["architecture"] if is_local else exported.name,
        dataset=config.data.dataset,
        classes=exported.arguments["num_classes"],
        shape=" x ".join(map(str, exported.image_shape)),
        parameters=f"{sum(parameter.numel() for parameter in exported.model.parameters()) / 1e6:.2f}",
        iteration=f"{exported.iteration:,}",
        epochs=config.train.epochs,
        version=augsub.__version__,
        figures="\n".join(measured) or "- not evaluated before this checkpoint",
        recipe=OmegaConf.to_yaml(OmegaConf.create(OmegaConf.structured(sections))).strip(),
    )
