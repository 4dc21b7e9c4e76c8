"""What a run is going to do, said at its start or instead of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor

from engine.config import Config
from engine.data import DataSource
from engine.trainer import Trainer

LOGGER = logging.getLogger("engine")
MOST_INITIAL = 0.05  # of an average of use: of digits_vit 1 % cost nothing, 5 % a tenth of the top-1, 15 % all of it
SPAN_OF_AVERAGE = 10  # times that an average goes through in a run: e ** -10 of its start is left


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
    log_left_out(trainer.data.source)
    log_warnings(config, trainer)


def log_left_out(source: DataSource) -> None:
    """Say which files of the data are no images."""
    for split, files in source.left_out.items():
        LOGGER.info("left out, no images: %s (%s)", files, split)


def log_warnings(config: Config, trainer: Trainer) -> None:
    """Say what may go wrong: micro-batches smaller than the recipe's, an average too slow for the run."""
    if config.train.micro_batch is not None and trainer.data.micro_batch < config.train.micro_batch:
        LOGGER.warning(
            "%d images at once per process, train.micro_batch is %d: mixing and BatchNorm see fewer images than there",
            trainer.data.micro_batch,
            config.train.micro_batch,
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


def plan_rows(config: Config, trainer: Trainer) -> list[tuple[str, str]]:
    """Length, batch and parameter groups of a run, as rows of a table."""
    data, epochs = trainer.data, trainer.max_iterations / trainer.data.iterations_per_epoch
    stopped = f", of {config.train.epochs} scheduled" if epochs < config.train.epochs else ""
    processes = trainer.process.world_size
    return [
        ("length", f"{epochs:.4g} epochs{stopped}, {trainer.max_iterations:,} iterations"),
        ("iterations per epoch", f"{data.iterations_per_epoch:,}"),
        (
            "images per iteration",
            f"{config.train.global_batch} = {data.micro_batch} x {data.accumulation} accumulated x "
            f"{processes} process{'es' if processes > 1 else ''}",
        ),
        ("optimiser", f"{config.optimizer.name} on {trainer.process.device.type}, amp {trainer.precision.amp}"),
        *_group_rows(trainer),
    ]


def _group_rows(trainer: Trainer) -> list[tuple[str, str]]:
    """What decays and what does not, which learning rates there are, and what does not learn."""
    groups = trainer.optimizer.param_groups
    rows = []
    for decay in sorted({group["weight_decay"] for group in groups}, reverse=True):
        tensors = [tensor for group in groups if group["weight_decay"] == decay for tensor in group["params"]]
        rows.append((f"weight decay {decay:g}" if decay else "no weight decay", _count(tensors)))
    scales = [group["lr_scale"] for group in groups]
    if min(scales) < max(scales):
        rows.append(("learning rate", f"{min(scales):.3g} to {max(scales):.3g} of the schedule's, by layer"))
    frozen = [parameter for parameter in trainer.bare_model.parameters() if not parameter.requires_grad]
    return [*rows, *([("frozen", _count(frozen))] if frozen else [])]


def _count(tensors: Iterable[Tensor]) -> str:
    sizes = [tensor.numel() for tensor in tensors]
    return f"{len(sizes)} tensors, {sum(sizes):,} parameters"
