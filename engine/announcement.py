"""What a run says at its start: model, processes, sub-models, length, data, and what may go wrong."""

from __future__ import annotations

import logging

import numpy as np
from timm.layers import DropPath

from augsub.residual_branches import images_kept
from engine.config import Config
from engine.data.source import DataSource
from engine.trainer import Trainer

LOGGER = logging.getLogger("engine")
MOST_INITIAL = 0.05  # of an average of use: of digits_vit 1 % cost nothing, 5 % a tenth of the top-1, 15 % all of it
MOST_ROUNDED = 0.05  # of a rate at which paths are skipped, which is that of whole images
SPAN_OF_AVERAGE = 10  # times that an average goes through in a run: e ** -10 of its start is left
SHOWN_CLASSES = 10


def log_plan(config: Config, trainer: Trainer) -> None:
    """Model, processes, sub-models, length."""
    parameters = sum(parameter.numel() for parameter in trainer.bare_model.parameters())
    processes, device = trainer.process.world_size, trainer.process.device.type
    strategy = f", {config.distributed.strategy}" if processes > 1 else ""
    LOGGER.info("%s: %.1f M parameters, %d x %s%s", config.model.name, parameters / 1e6, processes, device, strategy)
    for line in [*map(repr, trainer.objective.sub_models)] or ["no sub-model: plain training"]:
        LOGGER.info("%s", line)
    LOGGER.info(
        "%d iterations of %d images, %d per epoch",
        trainer.max_iterations,
        config.train.global_batch,
        trainer.data.iterations_per_epoch,
    )
    log_data(config, trainer.data.source)
    log_warnings(config, trainer)


def log_data(config: Config, source: DataSource) -> None:
    """Images, classes, and what may be wrong with them."""
    names = ", ".join(source.class_names[:SHOWN_CLASSES]) + (" …" if len(source.class_names) > SHOWN_CLASSES else "")
    images = f"{len(source.train):,} training and {len(source.held_out):,} held-out images"
    LOGGER.info("%s, %d classes: %s", images, source.num_classes, names)
    log_left_out(source)
    labels = getattr(source.held_out, "labels", None)
    if labels is None or not len(labels):
        return
    if not source.has_several_labels:
        lacking = sorted({*range(source.num_classes)} - {*np.unique(labels).tolist()})
        if lacking:
            LOGGER.warning(
                "WARNING: no held-out image of %d classes: %s",
                len(lacking),
                ", ".join(source.class_names[number] for number in lacking[:SHOWN_CLASSES]),
            )
    elif max(source.train_labels.sum(axis=1), default=0) <= 1:
        LOGGER.warning(
            "WARNING: no image has two labels between which data.label_separator = %r stands",
            config.data.label_separator,
        )


def log_left_out(source: DataSource) -> None:
    """Say what of the data is no image, or in no split."""
    for split, files in source.left_out.items():
        LOGGER.info("left out: %s (%s)", files, split)


def log_warnings(config: Config, trainer: Trainer) -> None:
    """Say what may go wrong: too few images at once for the recipe or for its dropped paths, too slow an average."""
    if config.train.micro_batch is not None and trainer.data.micro_batch < config.train.micro_batch:
        LOGGER.warning(
            "%d images at once per process, train.micro_batch is %d: mixing and BatchNorm see fewer images than there",
            trainer.data.micro_batch,
            config.train.micro_batch,
        )
    if config.train.skip_dropped_paths:
        images = trainer.data.micro_batch
        paths = (module for module in trainer.bare_model.modules() if isinstance(module, DropPath))
        rates = {path.drop_prob: 1 - images_kept(images, path.drop_prob) / images for path in paths}
        asked, has = max(rates.items(), key=lambda rate: abs(rate[0] - rate[1]), default=(0.0, 0.0))
        if abs(asked - has) > MOST_ROUNDED:
            LOGGER.warning(
                "WARNING: train.skip_dropped_paths with %d images at once per process: a branch of rate %.3g drops "
                "%.3g of them; more images at once come nearer",
                images,
                asked,
                has,
            )
    steps = trainer.max_iterations
    initial = config.ema.decay**steps  # share of the first weights in the last average
    if config.ema.enabled and not config.ema.warmup and initial > MOST_INITIAL:
        LOGGER.warning(
            "WARNING: ema.decay = %g: after %d steps the average still consists of the initial weights to %.1f %%; "
            "ema.warmup=true ramps the decay up, or set ema.decay=%g",
            config.ema.decay,
            steps,
            100 * initial,
            max(0.0, 1 - float(f"{SPAN_OF_AVERAGE / steps:.1g}")),
        )
