"""What happens around the steps of a run: its hooks, in their order, from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from engine import hooks
from engine.checkpoint.store import CheckpointStore
from engine.config import Config
from engine.config_file import leaves, to_yaml
from engine.errors import input_errors
from engine.evaluation import evaluate
from engine.evaluation.results import WEIGHTS
from engine.parallel import is_sharded
from engine.run_folder import RunFolder
from engine.schedule import build_schedule
from engine.train_loop import HookBase
from engine.trainer import Trainer
from engine.writers import (
    CSVWriter,
    JSONLinesWriter,
    LogWriter,
    TensorBoardWriter,
    WandbWriter,
    Writer,
    require_wandb,
)


def build_hooks(
    config: Config,
    trainer: Trainer,
    store: CheckpointStore,
    ema: ModelEmaV3 | None,
    draw_sub_models: Callable[[Tensor], dict[str, Tensor]],
) -> list[HookBase]:
    """Hooks in the order in which they run."""
    process, data, stop_mixing = trainer.process, trainer.data, config.mixup.off_epoch
    folder = RunFolder(config.output_dir)
    schedule = build_schedule(
        config.schedule, config.optimizer, config.train.epochs, data.iterations_per_epoch, config.train.global_batch
    )
    run_evaluation = partial(_evaluate, trainer)
    evaluations = {"": partial(run_evaluation, trainer.bare_model, "")}
    if ema is not None and config.ema.evaluate:
        evaluations["ema_"] = partial(run_evaluation, ema.module, "ema_")
    guard = hooks.NaNGuard(period=config.log.period if process.device.type == "cuda" else 1)
    evaluation = hooks.Evaluation(
        evaluations, config.evaluation.period * data.iterations_per_epoch, config.evaluation.metric
    )
    saving = hooks.Checkpoint(
        store,
        evaluation,
        guard,
        facts={"config": to_yaml(config), "model_name": config.model.name, **data.source.facts},
        period=config.checkpoint.period or data.iterations_per_epoch,
        every_minutes=config.checkpoint.every_minutes,
    )
    if config.log.wandb is not None and process.is_main:
        require_wandb(config.log.wandb)  # now, before the run has a folder
    writing = hooks.WriteRecords(
        partial(_open_writers, config, folder, trainer), config.log.period, config.train.global_batch
    )
    with input_errors("hooks"):
        own_hooks = hooks.build_own_hooks(config.hooks)
    sharded = is_sharded(config.distributed, process)
    pictures = hooks.SubModelPictures(draw_sub_models, writing)  # a forward: of all processes together if sharded
    everywhere = [
        *([hooks.SameBatchNormStatistics(trainer.bare_model)] if sharded else []),
        hooks.LearningRateSchedule(schedule, per_epoch=config.schedule.unit == "epoch"),
        *([hooks.StopMixing(trainer.mix, stop_mixing)] if trainer.mix is not None and stop_mixing is not None else []),
        *([hooks.ExponentialMovingAverage(ema)] if ema is not None else []),
        hooks.GradientNorm(config.log.period),
        guard,  # before anything looks at weights that may be ruined
        evaluation,
        *own_hooks,  # before the writing, which writes their results too
        hooks.UniteBadFiles(data.bad_files, data.iterations_per_epoch),  # the evaluation finds some too
        writing,  # after the evaluation, whose results it writes; before the checkpoint, which may cover the record
        *([pictures] if sharded or process.is_main else []),  # after the writing, which opens the writers
        saving,
        hooks.Preemption(saving),
    ]
    title = f"{Path(config.output_dir).name}: {config.model.name} on {config.data.dataset}"
    report = hooks.Report(folder, evaluation, title, _report_facts(config), data.bad_files)
    only_main = [
        *([hooks.Profiler(folder.trace)] if config.train.profile else []),  # after all others that belong to a step
        hooks.ProgressBar(writing),  # after the writing, whose records it shows
        report,  # at the end, when all is written
    ]
    return everywhere + (only_main if process.is_main else [])


def _evaluate(trainer: Trainer, model: nn.Module, prefix: str) -> dict[str, float]:
    if trainer.process.world_size > 1:
        # each process has seen other images; of an average, those of the main process: they are what is saved
        distribute_bn(model, trainer.process.world_size, reduce=prefix != "ema_")
    name = f"the {WEIGHTS[prefix]} weights after iteration {trainer.iteration}"
    return evaluate(model, trainer.data.held_out, trainer.precision, trainer.process, name)


def _open_writers(config: Config, folder: RunFolder, trainer: Trainer, iteration: int) -> list[Writer]:
    """The main process's writers, in the order in which they get a record."""
    if not trainer.process.is_main:
        return []
    log, values = config.log, leaves(config)
    return [
        # first: if it does not begin, there is no metrics.jsonl yet, and the same command can be given again
        *([WandbWriter(log.wandb, folder.path, folder.wandb_id, values)] if log.wandb is not None else []),
        LogWriter(iteration, trainer.max_iterations),
        JSONLinesWriter(folder.metrics, iteration),
        *([CSVWriter(folder.table, folder.metrics)] if log.csv else []),  # made of the file before it
        TensorBoardWriter(folder.path, iteration, to_yaml(config), values),
    ]


def _report_facts(config: Config) -> list[tuple[str, str]]:
    """What belongs beside the results: where the weights came from, and what the paper reports."""
    model, paper = config.model, config.published
    start = model.checkpoint or ("timm's pretrained weights" if model.pretrained else "random weights")
    reported = {"MaskSub": paper.masksub, "baseline": paper.baseline}
    numbers = ", ".join(f"{way} {top1} %" for way, top1 in reported.items() if top1 is not None)
    return [("started from", start), *([("published, top-1", numbers)] if numbers else [])]
