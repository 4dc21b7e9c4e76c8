"""The published recipes (recipes.yaml) beside the configurations that claim to be them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import augsub
from engine.config import Config
from engine.config_file import load_config
from engine.data.source import IMAGENET
from engine.defaults import create_configured_model
from engine.optim import Schedule, build_schedule
from models.recipe import freeze

FACTS = Path(__file__).with_name("recipes.yaml")
CONFIGS = Path(__file__).parents[2] / "configs"
TRAINING_IMAGES = 1_281_167
CONFIG_OF = {
    **{f"deit3_{size}_{epochs}": f"deit3_{size}_{epochs}e" for size in "sblh" for epochs in (400, 800)},
    **{f"deit3_{size}_finetune": f"deit3_{size}_finetune" for size in "blh"},
    **{f"mae_{size}": f"mae_{size[0]}" for size in ("b_ft100", "l_ft50", "h_ft50")},
    **{f"swin_{size}_300": f"swin_{size}" for size in "tsb"},
    **{f"resnet{depth}_rsb_300": f"resnet{depth}" for depth in (50, 101, 152)},
    **{f"ftclip_{size}_224": f"clip_{size}" for size in ("b16", "l14")},
}


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Every published recipe by its id."""
    content = yaml.load(FACTS.read_text(), yaml.CSafeLoader)
    assert sorted(content["recipe_ids"]) == sorted(CONFIG_OF)
    return {recipe["id"]: recipe for recipe in content["recipes"]}


@functools.cache
def meta_model(config_name: str) -> nn.Module:
    """The configuration's full-size model, patched, with frozen parts, without memory for weights."""
    config = load_config(CONFIGS / f"{config_name}.yaml")
    with torch.device("meta"):
        model = augsub.patch(create_configured_model(config, IMAGENET))
    freeze(model, config.model.frozen)
    return model


@dataclass(frozen=True)
class Recipe:
    """One recipe: what is published, and our configuration."""

    id: str
    facts: dict[str, Any]
    path: Path
    config: Config

    @property
    def family(self) -> str:
        return self.facts["family"]

    @property
    def schedule(self) -> Schedule:
        train = self.config.train
        iterations = TRAINING_IMAGES // train.global_batch
        return build_schedule(self.config.schedule, self.config.optimizer, train.epochs, iterations, train.global_batch)

    @property
    def model(self) -> nn.Module:
        return meta_model(self.path.stem)


@pytest.fixture(params=CONFIG_OF)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """Each recipe in turn."""
    path = CONFIGS / f"{CONFIG_OF[request.param]}.yaml"
    return Recipe(request.param, published()[request.param], path, load_config(path))
