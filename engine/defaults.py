"""Assembly: a trainer with everything it needs, from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

import augsub
from engine.checkpoint.reading import load, load_facts
from engine.checkpoint.store import CheckpointStore
from engine.config import Config
from engine.config_file import to_yaml
from engine.criterion import build_criterion
from engine.data import DataSource, build_held_out, build_held_out_source, build_loaders, build_source
from engine.distributed import Process
from engine.errors import InputError, input_errors, memory_errors
from engine.evaluation import evaluate
from engine.log_file import LogFile
from engine.mixing import build_mixup
from engine.optim import build_optimizer
from engine.parallel import is_sharded, replicate, shard, shards_of, synchronise_batchnorm
from engine.plan import log_plan
from engine.plugins import import_plugins
from engine.precision import Precision
from engine.resume_rules import continue_from
from engine.run_folder import RunFolder
from engine.run_hooks import build_hooks
from engine.seeding import seed_all
from engine.trainer import Trainer
from models.blocks import checkpoint_gradients, innermost_blocks
from models.build import check_image_shape, create_model, image_settings
from models.initialise import freeze, make_drop_path_uniform, restart, start_class_token, start_head
from models.param_groups import param_groups
from models.weights import load_weights

LOGGER = logging.getLogger("engine")
IF_AVAILABLE = "if_available"  # value of model.pretrained
MODELS_TRANSFORM = ("mean", "std", "eval_crop", "eval_crop_mode", "eval_interpolation")  # null: the model's own


def train(config: Config, process: Process, resume: bool) -> None:
    """Train a run to its end; `resume` continues the one in its folder from its newest intact checkpoint."""
    folder = RunFolder(config.output_dir)
    if process.is_main and not resume:
        folder.refuse_if_taken()
    store = CheckpointStore(
        folder, process, config.checkpoint.keep, is_sharded(config.distributed, process), config.checkpoint.background
    )
    with LogFile() as log, ExitStack() as until_the_end:
        newest = store.newest() if resume else None
        changes = continue_from(config, load_facts(newest).get("config")) if newest is not None else []
        trainer = build_trainer(config, process, store, is_resumed=newest is not None)
        if process.is_main:
            until_the_end.enter_context(folder.opened(to_yaml(config), is_resumed=resume))
            log.open(folder.log)
        process.barrier()
        log_plan(config, trainer)
        if newest is not None:
            trainer.load_state_dict(load(newest, shards_of(trainer.state_dict(), trainer.optimizer)), newest)
            LOGGER.info("resumed %s after %d of %d iterations", newest, trainer.iteration, trainer.max_iterations)
            for change in changes:
                LOGGER.info("changed: %s", change)
        elif resume:
            LOGGER.info("no checkpoint in %s: starting at the beginning", folder.checkpoints)
        with memory_errors("lower train.micro_batch or evaluation.batch, the images at once in a process"):
            trainer.train()


def evaluate_only(config: Config, process: Process) -> dict[str, float]:
    """Evaluate `evaluation.checkpoint`, else the run's last checkpoint, else what the run would start from.

    An average of the weights in the file is evaluated too.
    """
    last = RunFolder(config.output_dir).last
    file = config.evaluation.checkpoint or (last if last.exists() else config.model.checkpoint)
    if file is None and not config.model.pretrained:
        raise InputError(
            f"nothing to evaluate: {last} does not exist; set evaluation.checkpoint, model.pretrained=true "
            "or output_dir"
        )
    import_plugins(config.plugins)
    fill_in_from_model(config)
    source = build_held_out_source(config)
    held_out, precision = build_held_out(config, source, process), build_precision(config, process)
    results = {}
    for prefix, model in models_to_evaluate(config, source, process, file):
        found = evaluate(model, held_out, precision, process)
        results |= {prefix + name: value for name, value in found.items()}
    held_out.bad_files.unite(process)
    return results


def models_to_evaluate(
    config: Config, source: DataSource, process: Process, file: str | Path | None
) -> Iterator[tuple[str, nn.Module]]:
    """The patched model with the weights in a file, and with their average if there is one: pairs (prefix, model).

    Args:
        file: a checkpoint or any file of weights, which must be complete; None: timm's pretrained ones.

    Yields:
        The prefix of the results of these weights, "" or "ema_", and the model, each time the same object.
    """
    model = augsub.patch(create_configured_model(config, source, pretrained=file is None))
    with input_errors(f"data.image_size with model.name = {config.model.name}"):
        check_image_shape(model, (source.in_chans, *[config.data.image_size] * 2))
    model.to(process.device)
    if file is None:
        own_classes = model.pretrained_cfg.get("num_classes", source.num_classes)
        if own_classes != source.num_classes:
            raise InputError(
                f"evaluation: {config.model.name} is pretrained for {own_classes} classes, "
                f"the data have {source.num_classes}"
            )
        yield "", model
        return
    LOGGER.info("evaluating %s", file)
    content = load(Path(file))
    hooks = content.get("hooks")
    averaged = hooks.get("ema") if isinstance(hooks, Mapping) else None
    for prefix, weights in (("", content), ("ema_", averaged)):
        if weights is not None:
            load_all_weights(model, weights, file)
            yield prefix, model


def load_all_weights(model: nn.Module, content: Mapping[str, Any], file: str | Path) -> None:
    """Load a checkpoint that must leave nothing of the model at its initial value."""
    with input_errors("evaluation"):
        report = load_weights(model, content, file)
    for classes, *_ in report.other_classes.values():
        raise InputError(f"evaluation: checkpoint {file} is for {classes} classes, the data have {model.num_classes}")
    if report.initial:
        raise InputError(
            f"evaluation: checkpoint {file} leaves {len(report.initial)} tensors of the model as they are initialised, "
            f"{report.initial[0]} among them"
        )


def build_trainer(config: Config, process: Process, store: CheckpointStore, is_resumed: bool = False) -> Trainer:
    """Data, model, objective, optimiser and hooks of a run, at its first step.

    A resumed run needs neither a hub nor the file it started from.
    """
    import_plugins(config.plugins)
    fill_in_from_model(config)
    seed_all(config.seed)  # the initial weights are the same in all processes
    with memory_errors(f"data.image_size = {config.data.image_size}"):
        source = build_source(config)
    data = build_loaders(config, source, process)
    bare_model = build_run_model(config, source, process, is_resumed)
    mixup = build_mixup(config, source.num_classes, data.micro_batch)
    objective = build_objective(config, build_criterion(config.loss, soft_labels=mixup is not None))
    with input_errors("augsub.sub_models"):
        objective.prepare(bare_model)
    augmentations = [sub_model.augmentation for sub_model in objective.sub_models]
    with input_errors(f"data.image_size with model.name = {config.model.name}"):
        check_image_shape(bare_model, (source.in_chans, *[config.data.image_size] * 2), augmentations)

    bare_model.to(process.device)
    ema = ModelEmaV3(bare_model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.enabled else None
    if config.train.compile:
        bare_model.compile()
    model = parallelise(config, process, bare_model, ema)
    with input_errors("optimizer"):
        groups = param_groups(
            bare_model, config.optimizer.weight_decay, config.optimizer.layer_decay, config.optimizer.full_lr
        )
    trainer = Trainer(
        model=model,
        bare_model=bare_model,
        objective=objective,
        optimizer=build_optimizer(config.optimizer, groups),
        data=data,
        precision=build_precision(config, process),
        process=process,
        mix=mixup,
        seed=config.seed,
    )
    trainer.register_hooks(build_hooks(config, trainer, store, ema))
    return trainer


def parallelise(config: Config, process: Process, bare_model: nn.Module, ema: ModelEmaV3 | None) -> nn.Module:
    """The model as `distributed.strategy` runs it; sharding changes the model itself, and its average alike."""
    if not is_sharded(config.distributed, process):
        return replicate(bare_model, process)
    for model in (bare_model, *([ema.module] if ema is not None else [])):
        shard(model, innermost_blocks(model), process, config.distributed.reshard_after_forward)
    return bare_model


def fill_in_from_model(config: Config) -> None:
    """What the configuration leaves to the model: image size, normalisation, evaluation crop."""
    transform = config.transform
    left_open = [key for key in MODELS_TRANSFORM if getattr(transform, key) is None]
    if config.data.image_size is not None and not left_open:
        return
    with input_errors("model.name"):
        own = image_settings(config.model.name)
    config.data.image_size = config.data.image_size or own.image_size
    for key in left_open:
        setattr(transform, key, own.transform[key])


def build_run_model(config: Config, source: DataSource, process: Process, is_resumed: bool = False) -> nn.Module:
    """The model of the configuration, patched, with the weights it starts from unless a checkpoint brings all."""
    settings = config.model
    pretrained = settings.pretrained if settings.checkpoint is None and not is_resumed else False
    model = create_configured_model(config, source, pretrained)
    if config.distributed.sync_batchnorm:
        model = synchronise_batchnorm(model, process)
    augsub.patch(model)
    with input_errors("model"):
        if not is_resumed:
            start_weights(config, model)
        freeze(model, settings.frozen)
    if config.train.grad_checkpointing:
        with input_errors(f"train.grad_checkpointing with model.name = {settings.name}"):
            checkpoint_gradients(model)
    return model


def start_weights(config: Config, model: nn.Module) -> None:
    """Load `model.checkpoint`, and initialise anew what is to start anew."""
    settings = config.model
    if settings.checkpoint is not None:
        content = load(Path(settings.checkpoint))
        load_weights(model, content, settings.checkpoint, settings.pos_embed_antialias).log(settings.checkpoint)
    restart(model, settings.restart)
    if settings.head_std is not None:
        start_head(model, settings.head_std, settings.head_bias_bound)
    if settings.class_token_std is not None:
        start_class_token(model, settings.class_token_std)


def create_configured_model(config: Config, source: DataSource, pretrained: bool | str = False) -> nn.Module:
    """The timm model of the configuration for this data; `pretrained` as `model.pretrained`."""
    settings = config.model
    optional = {"drop_path_rate": settings.drop_path_rate, "drop_rate": settings.drop_rate}
    arguments = {
        "num_classes": source.num_classes,
        "in_chans": source.in_chans,
        "image_size": config.data.image_size,
        **{name: rate for name, rate in optional.items() if rate is not None},
    }
    for name in ("pretrained", "img_size", *arguments):
        if name in settings.kwargs:
            raise InputError(f"model.kwargs.{name}: comes from other keys of the configuration or from the data")
    create = partial(create_model, settings.name, **arguments, **settings.kwargs)
    with input_errors("model"):
        try:
            model = create(pretrained=bool(pretrained))
        except ValueError as error:
            if pretrained != IF_AVAILABLE:
                raise
            settings.pretrained = False
            model = create(pretrained=False)  # is refused too if the weights were not the reason
            LOGGER.warning("WARNING: the model starts at random, model.pretrained is only %s: %s", IF_AVAILABLE, error)
    if settings.drop_path_shape == "uniform" and settings.drop_path_rate:
        make_drop_path_uniform(model, settings.drop_path_rate)
    return model


def build_objective(config: Config, criterion: nn.Module) -> augsub.SubModelObjective:
    """The training objective of the configuration."""
    sub_models = build_sub_models(config)
    with input_errors("augsub.sub_models"):
        return augsub.SubModelObjective(criterion, sub_models, config.augsub.main_weight)


def build_sub_models(config: Config) -> list[augsub.SubModel]:
    """The sub-models of the configuration."""
    with input_errors("augsub.sub_models"):
        return [augsub.SubModel(sub.augmentations, weight=sub.weight) for sub in config.augsub.sub_models]


def build_precision(config: Config, process: Process) -> Precision:
    """The configured precision; fp16 is for GPUs, a CPU emulates it ten times slower than float32."""
    amp = config.train.amp
    if amp == "fp16" and process.device.type == "cpu":
        LOGGER.info("train.amp = fp16 is for GPUs: on this CPU the run uses float32")
        amp = "off"
    train = config.train
    return Precision(amp, process.device, train.clip_norm, train.loss_scale, train.loss_scale_window)
