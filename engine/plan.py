"""What a run is going to do, said at its start."""

from __future__ import annotations

import logging

from engine.config import Config
from engine.trainer import Trainer

LOGGER = logging.getLogger("engine")


def log_plan(config: Config, trainer: Trainer) -> None:
    """Model, processes, sub-models, length."""
    parameters = sum(parameter.numel() for parameter in trainer.bare_model.parameters())
    processes, device = trainer.process.world_size, trainer.process.device.type
    strategy = f", {config.distributed.strategy}" if processes > 1 else ""
    LOGGER.info("%s: %.1f M parameters, %d x %s%s", config.model.name, parameters / 1e6, processes, device, strategy)
    for sub_model in trainer.objective.sub_models or ["no sub-model: plain training"]:
        LOGGER.info("%s", sub_model)
    LOGGER.info(
        "%d iterations of %d images, %d per epoch",
        trainer.max_iterations,
        config.train.global_batch,
        trainer.data.iterations_per_epoch,
    )
    if config.train.micro_batch is not None and trainer.data.micro_batch < config.train.micro_batch:
        LOGGER.warning(
            "%d images at once per process, train.micro_batch is %d: mixing and BatchNorm see fewer images than there",
            trainer.data.micro_batch,
            config.train.micro_batch,
        )
