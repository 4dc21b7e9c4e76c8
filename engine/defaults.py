"""Assembly: a trainer with everything it needs, from a configuration. Read it from top to bottom."""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

import augsub
from engine.announcement import log_plan
from engine.checkpoint import CheckpointStore, class_names_in, load, load_metadata, shardings_of
from engine.config import MODELS_TRANSFORM, Config, OptimizerConfig
from engine.config_file import changes_on_resume, fill_in_from, parse_config, to_yaml
from engine.data.loaders import DataLoaders, batch_for
from engine.data.source import DataSource, build_source, check_classes, check_pretrained_classes, check_resumed
from engine.distributed import Process, is_sharded, replicate, shard, synchronise_batchnorm
from engine.errors import InputError, input_errors, memory_errors
from engine.hooks import build_own_hooks
from engine.hooks.reporting import Evaluation, Profiler, ProgressBar, Report, SubModelPictures, WriteRecords
from engine.hooks.saving import Checkpoint, Preemption
from engine.hooks.training import (
    ExponentialMovingAverage,
    FrozenStatistics,
    GradientNorm,
    LearningRateSchedule,
    NaNGuard,
    Plateau,
    SameBatchNormStatistics,
    StopMixing,
)
from engine.loss import build_criterion, build_mixup, build_objective, build_teacher, class_weights
from engine.optim import build_optimizer, build_schedule
from engine.precision import Precision, compile_forward
from engine.run_folder import RunFolder
from engine.seeding import seed_all
from engine.train_loop import HookBase
from engine.trainer import Trainer
from engine.writers import LogFile
from models.build import (
    check_image_shape,
    checkpoint_gradients,
    create_model,
    image_settings,
    innermost_blocks,
)
from models.lora import add_lora
from models.recipe import (
    freeze,
    frozen_batchnorms,
    make_drop_path_uniform,
    param_groups,
    restart,
    start_class_token,
    start_head,
)
from models.weights import head_tensors, load_weights

LOGGER = logging.getLogger("engine")
IF_AVAILABLE = "if_available"  # value of model.pretrained


def train(config: Config, process: Process, resume: bool) -> None:
    """Train a run to its end; `resume` continues the one in its folder from its newest intact checkpoint."""
    folder = RunFolder(config.output_dir)
    with LogFile() as log, ExitStack() as until_the_end:
        store = open_store(config, process, resume)
        newest = store.newest() if resume else None
        resolved, source, changes = resolve(config, process, newest)
        trainer = build_trainer(resolved, source, process, store, is_resumed=newest is not None)
        if newest is not None and resolved.train.extend:
            refuse_fewer_steps(newest, trainer)
        if process.is_main:
            until_the_end.enter_context(folder.opened(to_yaml(resolved), is_resumed=resume))
            log.open(folder.log)
        process.barrier()
        log_plan(resolved, trainer)
        if newest is not None:
            trainer.load_state_dict(load(newest, shardings_of(trainer.state_dict(), trainer.optimizer)), newest)
            LOGGER.info("resumed %s after %d of %d iterations", newest, trainer.iteration, trainer.max_iterations)
            for change in changes:
                LOGGER.info("changed: %s", change)
        elif resume:
            LOGGER.info("no checkpoint in %s: starting at the beginning", folder.checkpoints)
        with memory_errors("lower train.micro_batch or evaluation.batch, the images at once in a process"):
            trainer.train()


def refuse_fewer_steps(newest: Path, trainer: Trainer) -> None:
    """Raise InputError if a run that is extended otherwise has had more steps than it would have now."""
    done = load_metadata(newest)["iteration"]
    if done > trainer.max_iterations:
        raise InputError(
            f"train.extend: {newest} has had {done} iterations, with these train.epochs and train.global_batch the run "
            f"would have {trainer.max_iterations}: raise train.epochs"
        )


def open_store(config: Config, process: Process, resume: bool) -> CheckpointStore:
    """The run's checkpoints; nothing is written.

    Raises:
        InputError: there is a run, and it is not to be resumed.
    """
    folder, checkpoint = RunFolder(config.output_dir), config.checkpoint
    if process.is_main and not resume:
        folder.refuse_if_taken()
    return CheckpointStore(folder, process, checkpoint.keep, checkpoint.background)


def open_source(config: Config) -> DataSource:
    """The data of a configuration."""
    with memory_errors(f"data.image_size = {config.data.image_size}"):
        return build_source(config)


def resolve(
    config: Config,
    process: Process,
    newest: Path | None = None,
    open_data: Callable[[Config], DataSource] = open_source,
) -> tuple[Config, DataSource, list[str]]:
    """The complete configuration, read-only from here on, the data it is for, and what it changes in a run.

    What `config` leaves open comes from the checkpoint where the run goes on, else from the model and the data.
    The user's plugins are imported.

    Args:
        newest: that checkpoint; None at the beginning.

    Raises:
        InputError: something cannot be found out, or would make another run of the one that goes on.
    """
    saved = {} if newest is None else load_metadata(newest)
    before = None if newest is None else parse_config(saved.get("config"), f"--resume: the configuration in {newest}")
    resolved = complete(config, before)
    if before is not None and resolved.model.pretrained == IF_AVAILABLE:
        resolved.model.pretrained = before.model.pretrained  # as it was decided then
    changes = [] if before is None else changes_on_resume(resolved, before)
    source = open_data(resolved)
    if newest is not None:
        check_resumed(resolved, source, saved, newest)
    if resolved.train.global_batch is None and source.train is not None:
        resolved.train.global_batch = batch_for(len(source.train), process.world_size)
    if resolved.model.pretrained == IF_AVAILABLE:
        resolved.model.pretrained = process.broadcast(process.is_main and has_pretrained_weights(resolved))
    resolved.freeze()
    return resolved, source, changes


def complete(config: Config, saved: Config | None = None) -> Config:
    """A copy in which nothing is left to the model any more: image size, normalisation, evaluation crop.

    The user's plugins are imported.

    Args:
        saved: the configuration of the run that goes on, which comes before what the model says.

    Raises:
        InputError: timm does not know it.
    """
    import_plugins(config.plugins)
    config = deepcopy(config)
    if saved is not None:
        fill_in_from(config, saved)
    transform = config.transform
    left_open = [key for key in MODELS_TRANSFORM if getattr(transform, key) is None]
    if config.data.image_size is not None and not left_open:
        return config
    with input_errors("model.name"):
        image_size, listed = image_settings(config.model.name)
    config.data.image_size = config.data.image_size or image_size
    missing = [f"transform.{key}" for key in left_open if key not in listed]
    if config.data.image_size is None:
        missing.append("data.image_size")
    if missing:
        raise InputError(f"model.name = {config.model.name}: timm lists no {', '.join(missing)} for it, set them")
    for key in left_open:
        setattr(transform, key, listed[key])
    return config


def has_pretrained_weights(config: Config) -> bool:
    """Whether timm's weights for the model can be had here; a warning says why not."""
    if config.model.checkpoint is not None:
        return False
    try:
        create_model(config.model.name, pretrained=True)
    except ValueError as error:
        LOGGER.warning(
            "WARNING: the model starts at random, model.pretrained is only %s: %s; without weights "
            "configs/scratch_folder.yaml has the better recipe",
            IF_AVAILABLE,
            error,
        )
        return False
    return True


def import_plugins(modules: Sequence[str]) -> None:
    """Import the user's modules, which register augmentations and hooks.

    They are named as in Python, and looked for in the working folder too, or by their file: folder/mine.py.

    Nothing else that is not this project's runs: YAML is read by a safe loader, checkpoints with weights_only.

    Raises:
        InputError: a module is missing, or cannot be imported.
    """
    for module in modules:
        file = Path(module)
        folder, name = (str(file.parent), file.stem) if file.suffix == ".py" else ("", module)
        sys.path.append(folder)
        place = f"plugins: {module} cannot be imported, from the working folder or the installed packages"
        try:
            with input_errors(place, Exception):  # it raises what it likes
                importlib.import_module(name)
        finally:
            sys.path.remove(folder)


def build_run_model(config: Config, source: DataSource, process: Process, is_resumed: bool = False) -> nn.Module:
    """The model of the configuration, patched, with the weights it starts from unless a checkpoint brings all."""
    settings = config.model
    pretrained = settings.pretrained and settings.checkpoint is None and not is_resumed
    model = create_configured_model(config, source, pretrained)
    if config.distributed.sync_batchnorm:
        model = synchronise_batchnorm(model, process)
    with input_errors(f"model.name = {settings.name} with train.skip_dropped_paths, augsub.update_batch_norm"):
        augsub.patch(model, config.train.skip_dropped_paths, config.augsub.update_batch_norm)
    with input_errors("model"):
        if not is_resumed:
            start_weights(config, model, source)
        if settings.lora.targets:
            add_lora(model, settings.lora.rank, settings.lora.targets)
        freeze(model, settings.frozen)
    if config.train.grad_checkpointing:
        with input_errors(f"train.grad_checkpointing with model.name = {settings.name}"):
            checkpoint_gradients(model)
    return model


def start_weights(config: Config, model: nn.Module, source: DataSource) -> None:
    """Load `model.checkpoint`, and initialise anew what is to start anew.

    Raises:
        InputError: a head that is kept is for other classes than the data have.
    """
    settings = config.model
    head, restarted = head_tensors(model), tuple(f"{name}." for name in settings.restart)
    keeps_head = settings.head_std is None and not any(tensor.startswith(restarted) for tensor in head)
    if settings.checkpoint is not None:
        weights = load(Path(settings.checkpoint))
        report = load_weights(model, weights, settings.checkpoint, settings.pos_embed_antialias)
        report.log(settings.checkpoint)
        if keeps_head and head <= set(report.loaded):
            start = f"model.checkpoint = {settings.checkpoint}, whose head is kept,"
            check_classes(config, source.class_names, class_names_in(settings.checkpoint), start)
    elif settings.pretrained and keeps_head:
        check_pretrained_classes(config, source.class_names, model, f"model.name = {settings.name}")
    restart(model, settings.restart)
    if settings.head_std is not None:
        start_head(model, settings.head_std, settings.head_bias_bound)
    if settings.class_token_std is not None:
        start_class_token(model, settings.class_token_std)


def create_configured_model(config: Config, source: DataSource, pretrained: bool = False) -> nn.Module:
    """The timm model of the configuration for this data."""
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
    for name, value in settings.kwargs.items():
        if value is None:  # timm would leave it out
            raise InputError(f"model.kwargs.{name} = null: must have a value, or go")
    create = partial(create_model, settings.name, **arguments, **settings.kwargs)
    with input_errors("model"):
        model = create(pretrained=pretrained)
    if settings.drop_path_shape == "uniform" and settings.drop_path_rate:
        make_drop_path_uniform(model, settings.drop_path_rate)
    return model


def build_trainer(
    config: Config, source: DataSource, process: Process, store: CheckpointStore, is_resumed: bool = False
) -> Trainer:
    """Loaders, model, objective, optimiser and hooks of a run, at its first step.

    A resumed run needs neither a hub nor the file it started from.
    """
    seed_all(config.seed)  # the initial weights are the same in all processes
    data = DataLoaders(config, source, process)
    bare_model = build_run_model(config, source, process, is_resumed)
    mixup = build_mixup(config, source, data.micro_batch, process.device)
    weights = class_weights(config.loss, source)
    criterion = build_criterion(config.loss, soft_labels=mixup is not None, weights=weights).to(process.device)
    objective = build_objective(config, criterion)
    with input_errors("augsub.sub_models"):
        objective.prepare(bare_model)
    frozen = FrozenStatistics(frozen_batchnorms(bare_model, config.model.frozen))
    check_images(config, source, bare_model, objective, frozen, data.micro_batch)

    bare_model.to(process.device)
    if config.train.channels_last and not is_sharded(config.distributed, process):  # FSDP2 shards contiguous tensors
        bare_model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(bare_model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.enabled else None
    teacher = build_teacher(config, source)
    objective.teach_by(
        teacher=None if teacher is None else teacher.to(process.device), ema=None if ema is None else ema.module
    )
    compile_forward(bare_model, config.train.compile, has_eager_draws=objective.replays_draws)
    model = parallelise(config, process, bare_model, ema)
    trainer = Trainer(
        model=model,
        bare_model=bare_model,
        objective=objective,
        optimizer=build_model_optimizer(config.optimizer, bare_model),
        data=data,
        precision=build_precision(config, process),
        process=process,
        mix=mixup,
        seed=config.seed,
    )
    trainer.register_hooks([frozen])  # before all others, some of which look at the model
    trainer.register_hooks(build_hooks(config, trainer, store, ema))
    return trainer


def check_images(
    config: Config,
    source: DataSource,
    model: nn.Module,
    objective: augsub.Objective,
    frozen: FrozenStatistics,
    micro_batch: int,
) -> None:
    """Refuse images that main model or sub-models cannot take, or too few of them at once."""
    shape = source.image_shape(config.data.image_size)
    # where a ratio changes, else all are one augmentation; after the beginning, as 0 may be well and little more not
    times = (0, 1e-6, config.train.epochs)
    augmentations = [*dict.fromkeys(sub_model.at(epoch) for sub_model in objective.sub_models for epoch in times)]
    frozen.before_step()
    with input_errors("augsub.sub_models"):
        for sub_model in objective.sub_models:
            sub_model.images_of(micro_batch)
    with input_errors(f"data.image_size with model.name = {config.model.name}"):
        check_image_shape(model, shape, augmentations)
    if micro_batch == 1:  # BatchNorm needs two values in each channel
        remedy = "one image at once: raise train.global_batch, or lower train.accumulation, or another data.image_size"
        with input_errors(f"train.global_batch = {config.train.global_batch}, {remedy}"):
            check_image_shape(model, shape, augmentations, batch=1)


def build_model_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimiser of all that learns in a model."""
    with input_errors("optimizer"):
        groups = param_groups(model, config.weight_decay, config.layer_decay, config.full_lr)
    return build_optimizer(config, groups)


def build_hooks(config: Config, trainer: Trainer, store: CheckpointStore, ema: ModelEmaV3 | None) -> list[HookBase]:
    """Hooks in the order in which they run."""
    process, data, stop_mixing = trainer.process, trainer.data, config.mixup.off_epoch
    folder = RunFolder(config.output_dir)
    schedule = build_schedule(
        config.schedule, config.optimizer, config.train.epochs, data.iterations_per_epoch, config.train.global_batch
    )
    period = min(config.log.period, data.iterations_per_epoch)  # of small data: a record beside each evaluation
    guard = NaNGuard(period=period if process.device.type == "cuda" else 1)
    evaluation = Evaluation(
        config.evaluation.period * data.iterations_per_epoch,
        config.train.epochs * data.iterations_per_epoch,
        config.evaluation.metric,
        config.evaluation.patience,
        average=ema.module if ema is not None and config.ema.evaluate else None,
    )
    saving = Checkpoint(
        store,
        evaluation,
        guard,
        facts={"config": to_yaml(config), "model_name": config.model.name, **data.source.facts},
        period=config.checkpoint.period or data.iterations_per_epoch,
        every_minutes=config.checkpoint.every_minutes,
    )
    writing = WriteRecords(config, folder, period)
    with input_errors("hooks"):
        own_hooks = build_own_hooks(config.hooks)
    sharded = is_sharded(config.distributed, process)
    pictures = SubModelPictures(config, writing)  # a forward: of all processes together if sharded
    learning_rate = LearningRateSchedule(schedule, per_epoch=config.schedule.unit == "epoch")
    falling = Plateau(learning_rate, evaluation, config.schedule.patience, config.schedule.decay_rate)
    everywhere = [
        *([SameBatchNormStatistics(trainer.bare_model)] if sharded else []),
        *([SameBatchNormStatistics(ema.module)] if ema is not None and process.world_size > 1 else []),
        learning_rate,
        *([StopMixing(trainer.mix, stop_mixing)] if trainer.mix is not None and stop_mixing is not None else []),
        *([ExponentialMovingAverage(ema)] if ema is not None else []),
        GradientNorm(period),
        guard,  # before anything looks at weights that may be ruined
        evaluation,
        *([falling] if config.schedule.name == "plateau" else []),
        *own_hooks,  # before the writing, which writes their results too
        data.bad_files,  # the evaluation finds some too
        writing,  # after the evaluation, whose results it writes; before the checkpoint, which may cover the record
        *([pictures] if sharded or process.is_main else []),  # after the writing, which opens the writers
        saving,
        Preemption(saving),
    ]
    only_main = [
        *([Profiler(folder.trace)] if config.train.profile else []),  # after all others that belong to a step
        ProgressBar(writing),  # after the writing, whose records it shows
        Report(config, folder, evaluation, pictures),  # at the end, when all is written
    ]
    names = Counter(hook.state_name for hook in (*everywhere, *only_main) if hook.state_name)
    for name in (name for name, count in names.items() if count > 1):
        raise InputError(f"hooks: two have the state_name {name!r}, under which a checkpoint holds the state of one")
    return everywhere + (only_main if process.is_main else [])


def parallelise(config: Config, process: Process, bare_model: nn.Module, ema: ModelEmaV3 | None) -> nn.Module:
    """The model as `distributed.strategy` runs it; sharding changes the model itself, and its average alike."""
    if not is_sharded(config.distributed, process):
        return replicate(bare_model, process, config.distributed.reduce_dtype)
    for model in (bare_model, *([ema.module] if ema is not None else [])):
        settings = config.distributed
        shard(model, innermost_blocks(model), process, settings.reshard_after_forward, settings.reduce_dtype)
    if ema is not None and any(buffer.is_floating_point() for buffer in bare_model.buffers()):
        ema.foreach = False  # BatchNorm's statistics are whole: torch takes no mixture of shards and whole tensors
    return bare_model


def build_precision(config: Config, process: Process) -> Precision:
    """The configured precision; fp16 is for GPUs, a CPU emulates it ten times slower than float32."""
    amp = config.train.amp
    if amp == "fp16" and process.device.type == "cpu":
        LOGGER.info("train.amp = fp16 is for GPUs: on this CPU the run uses float32")
        amp = "off"
    train = config.train
    return Precision(amp, process.device, train.clip_norm, train.loss_scale, train.loss_scale_window)
