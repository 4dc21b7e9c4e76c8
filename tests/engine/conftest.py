"""Configurations for folders of images."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.config import Config


@pytest.fixture
def folder_config() -> Callable[..., Config]:
    """Makes the configuration of three short epochs on a folder, with changes of its section `data`."""

    def make(root: object, **data: object) -> Config:
        config = Config()
        vars(config.data).update({"root": str(root), "image_size": 16, "workers": 0, **data})
        config.transform.auto_augment = "rand-m9-mstd0.5-inc1"
        config.train.global_batch, config.train.epochs, config.evaluation.batch = 8, 3, 4
        return config

    return make
