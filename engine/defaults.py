"""Assembly: a trainer with everything it needs, from a configuration."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

import augsub
from engine import checkpoint, hooks
from engine.config import Config
from engine.config_file import to_yaml
from engine.criterion import build_criterion, build_mixup
from engine.data import DataLoaders, build_loaders
from engine.distributed import Process, wrap
from engine.errors import InputError, input_errors
from engine.evaluation import evaluate
from engine.log_file import LogFile
from engine.optim import build_optimizer, build_schedule
from engine.precision import Precision
from engine.run_folder import RunFolder
from engine.seeding import seed_all
from engine.train_loop import HookBase
from engine.trainer import Trainer
from engine.writers import JSONLinesWriter, LogWriter, TensorBoardWriter, Writer
from models.build import check_image_shape, create_model

LOGGER = logging.getLogger("engine")


def train(config: Config, process: Process, resume: bool) -> None:
    """Train a run to its end; `resume` continues the one in its folder."""
    folder = RunFolder(config.output_dir)
    if process.is_main and not resume:
        folder.refuse_if_taken()
    with LogFile() as log:
        trainer = build_trainer(config, process, folder)
        if process.is_main:
            folder.open(config)
            log.open(folder.log)
        process.barrier()
        _log_plan(config, trainer)
        if resume:
            _resume(trainer, folder)
        trainer.train()


def evaluate_only(config: Config, process: Process) -> dict[str, float]:
    """Evaluate `model.checkpoint`, else the run's last checkpoint, else timm's pretrained weights."""
    import_plugins(config.plugins)
    data = build_loaders(config, process)
    model = build_run_model(config, data)
    last = RunFolder(config.output_dir).last
    if config.model.checkpoint is None:
        if last.is_file():
            checkpoint.load_weights(model, checkpoint.load(last)["model"], last)
        elif not config.model.pretrained:
            raise InputError(
                f"nothing to evaluate: {last} does not exist; set model.checkpoint, model.pretrained=true or output_dir"
            )
    model.to(process.device)
    return evaluate(model, data.held_out, build_precision(config, process), process)


def build_trainer(config: Config, process: Process, folder: RunFolder) -> Trainer:
    """Data, model, objective, optimiser and hooks of a run, at its first step."""
    import_plugins(config.plugins)
    seed_all(config.seed)  # the initial weights are the same in all processes
    data = build_loaders(config, process)
    bare_model = build_run_model(config, data)
    mixup = build_mixup(config.mixup, config.loss.smoothing, data.num_classes, data.micro_batch)
    objective = build_objective(config, build_criterion(config.loss, soft_labels=mixup is not None))
    with input_errors("augsub.sub_models"):
        objective.prepare(bare_model)
    augmentations = [sub_model.augmentation for sub_model in objective.sub_models]
    with input_errors(f"data.image_size with model.name = {config.model.name}"):
        check_image_shape(bare_model, (data.in_chans, *[config.data.image_size] * 2), augmentations)

    bare_model.to(process.device)
    optimizer = build_optimizer(config.optimizer, bare_model)
    ema = ModelEmaV3(bare_model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.enabled else None
    if config.train.compile:
        bare_model.compile()
    trainer = Trainer(
        model=wrap(bare_model, process),
        bare_model=bare_model,
        objective=objective,
        optimizer=optimizer,
        data=data,
        precision=build_precision(config, process),
        process=process,
        mix=mixup,
        accumulation=config.train.accumulation,
        seed=config.seed,
    )
    trainer.register_hooks(build_hooks(config, trainer, folder, ema))
    return trainer


def build_hooks(config: Config, trainer: Trainer, folder: RunFolder, ema: ModelEmaV3 | None) -> list[HookBase]:
    """Hooks in the order in which they run."""
    process, data = trainer.process, trainer.data
    schedule = build_schedule(config.schedule, trainer.optimizer, config.train.epochs, data.iterations_per_epoch)
    run_evaluation = partial(_evaluate, trainer)
    evaluations = {"": partial(run_evaluation, trainer.bare_model)}
    if ema is not None:
        evaluations["ema_"] = partial(run_evaluation, ema.module)
    guard = hooks.NaNGuard(period=config.log.period if process.device.type == "cuda" else 1)
    evaluation = hooks.Evaluation(
        evaluations, config.evaluation.period * data.iterations_per_epoch, config.evaluation.metric
    )
    saving = hooks.Checkpoint(
        folder,
        evaluation,
        guard,
        facts={"config": to_yaml(config), "model_name": config.model.name},
        period=config.checkpoint.period or data.iterations_per_epoch,
        every_minutes=config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
    )
    writing = hooks.WriteRecords(partial(_open_writers, folder, process), config.log.period, config.train.global_batch)
    everywhere = [
        hooks.LearningRateSchedule(schedule),
        *([hooks.ExponentialMovingAverage(ema)] if ema is not None else []),
        guard,  # before anything looks at weights that may be ruined
        evaluation,
        writing,  # after the evaluation, whose results it writes; before the checkpoint, which may cover the record
        saving,
    ]
    title = f"{Path(config.output_dir).name}: {config.model.name} on {config.data.dataset}"
    only_main = [hooks.ProgressBar(), hooks.Report(folder, evaluation, title)]
    return everywhere + (only_main if process.is_main else [])


def build_run_model(config: Config, data: DataLoaders) -> nn.Module:
    """The model of the configuration, patched, with the weights it starts from."""
    model = augsub.patch(create_configured_model(config, data.num_classes, data.in_chans))
    if config.model.checkpoint is not None:
        path = Path(config.model.checkpoint)
        weights = checkpoint.load(path)
        checkpoint.load_weights(model, weights.get("model", weights), path)
    return model


def create_configured_model(config: Config, num_classes: int, in_chans: int) -> nn.Module:
    """The timm model of the configuration, before `model.checkpoint` is loaded."""
    model = config.model
    optional = {"drop_path_rate": model.drop_path_rate, "drop_rate": model.drop_rate}
    with input_errors("model"):
        return create_model(
            model.name,
            num_classes=num_classes,
            in_chans=in_chans,
            image_size=config.data.image_size,
            pretrained=model.pretrained,
            **{name: rate for name, rate in optional.items() if rate is not None},
            **model.kwargs,
        )


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
    return Precision(amp, process.device, config.train.clip_norm)


def import_plugins(modules: Sequence[str]) -> None:
    """Import the user's modules, which register augmentations; the working folder is searched too."""
    sys.path.append("")
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"plugins: {module} cannot be imported: {error}") from error
    finally:
        sys.path.remove("")


def _evaluate(trainer: Trainer, model: nn.Module) -> dict[str, float]:
    if trainer.process.world_size > 1:
        distribute_bn(model, trainer.process.world_size, reduce=True)  # each process has seen other images
    return evaluate(model, trainer.data.held_out, trainer.precision, trainer.process)


def _open_writers(folder: RunFolder, process: Process, iteration: int) -> list[Writer]:
    if not process.is_main:
        return []
    return [LogWriter(), JSONLinesWriter(folder.metrics, iteration), TensorBoardWriter(folder.path, iteration)]


def _log_plan(config: Config, trainer: Trainer) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.bare_model.parameters())
    processes, device = trainer.process.world_size, trainer.process.device.type
    LOGGER.info("%s: %.1f M parameters, %d x %s", config.model.name, parameters / 1e6, processes, device)
    for sub_model in trainer.objective.sub_models or ["no sub-model: plain training"]:
        LOGGER.info("%s", sub_model)
    LOGGER.info(
        "%d iterations of %d images, %d per epoch",
        trainer.max_iterations,
        config.train.global_batch,
        trainer.data.iterations_per_epoch,
    )


def _resume(trainer: Trainer, folder: RunFolder) -> None:
    if not folder.last.is_file():
        LOGGER.info("no checkpoint in %s: starting at the beginning", folder.checkpoints)
        return
    state = checkpoint.load(folder.last)
    checkpoint.load_weights(trainer.bare_model, state["model"], folder.last)
    trainer.load_state_dict(state)
    LOGGER.info("resumed %s after %d of %d iterations", folder.last, trainer.iteration, trainer.max_iterations)
