"""`train_net.py --dry-run`: all of a run is built and checked, a few steps are timed, its folder stays as it is."""

from __future__ import annotations

from pathlib import Path

from engine.announcement import log_warnings
from engine.checkpoint import load_metadata
from engine.config import Config
from engine.config_file import CONFIGS, load_config
from engine.data.source import IMAGENET, DataSource
from engine.defaults import (
    build_run_model,
    build_trainer,
    open_source,
    open_store,
    resolve,
)
from engine.distributed import Process, is_sharded, memory_of
from engine.errors import InputError
from engine.figure import draw_schedule, save
from engine.optim import build_schedule
from engine.run_folder import RunFolder
from engine.text import readable_size, text_table
from engine.trainer import Trainer
from models.complexity import activation_memory
from tools.analysis import analyze_configured
from tools.step_costs import Strategy, build_step, memory
from tools.timing import time_rows

RECIPES = CONFIGS / "_base_" / "imagenet.yaml"  # whose data.root is where the recipes look if nobody says where
Rows = list[tuple[str, str]]


def dry_run(config: Config, process: Process, resume: bool) -> None:
    """Print the plan of a run and draw its learning rate.

    Where nobody has said where ImageNet-1k is, the plan is for as many images and classes as it has.

    Raises:
        InputError: whatever else the run itself would refuse.
    """
    store = open_store(config, process, resume)
    newest = store.newest() if resume else None
    missing: list[InputError] = []

    def data_or_imagenet(config: Config) -> DataSource:
        """The data; where nobody has said where ImageNet-1k is, something of its size, and what is `missing`."""
        try:
            return open_source(config)
        except InputError as error:
            data, recipes = config.data, load_config(RECIPES).data
            if (data.dataset, data.root) != (recipes.dataset, recipes.root) or Path(data.root).exists():
                raise
            missing.append(error)
            return IMAGENET

    config, source, changes = resolve(config, process, newest, data_or_imagenet)
    trainer = build_trainer(config, source, process, store, is_resumed=newest is not None)
    if process.is_main:
        start = ("starts", "at the beginning")
        if newest is not None:
            start = ("goes on from", f"{newest} after {load_metadata(newest)['iteration']:,} iterations")
        rows = [
            start,
            *(("changed", change) for change in changes),
            *(("data", f"not there, counted as ImageNet-1k: {error}") for error in missing),
            *data_rows(config, trainer),
            *length_rows(config, trainer),
            *memory_rows(config, trainer),
        ]
    times = time_rows(config, trainer, has_data=not missing)  # of all processes together
    if process.is_main:
        log_warnings(config, trainer)
        rows += [*times, ("learning rate, drawn", str(draw(config, trainer)))]
        print(f"{Path(config.output_dir).name}: {config.model.name}\n{text_table(rows)}")
        for error in missing:
            print(f"WARNING: {error}: the run itself would end here")


def data_rows(config: Config, trainer: Trainer) -> Rows:
    """The data, and what the models compute of an image."""
    source = trainer.data.source
    shape = source.image_shape(config.data.image_size)
    return [
        ("training images", f"{len(source.train):,} of {' x '.join(map(str, shape))}"),
        ("held-out images", f"{len(source.held_out):,}"),
        ("classes", f"{source.num_classes}"),
        *((f"left out of {split}", files) for split, files in source.left_out.items()),
        *analyze_configured(config, source).cost_rows(),
    ]


def length_rows(config: Config, trainer: Trainer) -> Rows:
    """Length and batch; what decays and what does not, which learning rates there are, and what does not learn."""
    data, train, processes = trainer.data, config.train, trainer.process.world_size
    epochs, groups = trainer.max_iterations / data.iterations_per_epoch, trainer.optimizer.param_groups
    stopped = f", of {train.epochs} scheduled" if epochs < train.epochs else ""
    batch = f"{train.global_batch} = {data.micro_batch} x {data.accumulation} accumulated x {processes} process"
    tensors = {
        f"weight decay {decay:g}" if decay else "no weight decay": [
            tensor for group in groups if group["weight_decay"] == decay for tensor in group["params"]
        ]
        for decay in sorted({group["weight_decay"] for group in groups}, reverse=True)
    }
    tensors["frozen"] = [tensor for tensor in trainer.bare_model.parameters() if not tensor.requires_grad]
    scales = [group["lr_scale"] for group in groups]
    rates = f"{min(scales):.3g} to {max(scales):.3g} of the schedule's, by layer"
    return [
        ("length", f"{epochs:.4g} epochs{stopped}, {trainer.max_iterations:,} iterations"),
        ("iterations per epoch", f"{data.iterations_per_epoch:,}"),
        ("images per iteration", f"{batch}{'es' if processes > 1 else ''}"),
        ("optimiser", f"{config.optimizer.name} on {trainer.process.device.type}, amp {trainer.precision.amp}"),
        *([("learning rate", rates)] if min(scales) < max(scales) else []),
        *(
            (name, f"{len(group)} tensors, {sum(tensor.numel() for tensor in group):,} parameters")
            for name, group in tensors.items()
            if group
        ),
    ]


def memory_rows(config: Config, trainer: Trainer) -> Rows:
    """What each process needs: tensors counted; activations measured, of all branches whose graphs live at once."""
    process, source, images = trainer.process, trainer.data.source, trainer.data.micro_batch
    alone = Process(rank=0, world_size=1, device=process.device)
    model = build_run_model(config, source, alone, is_resumed=True).to(process.device)
    objective = trainer.objective
    objective.prepare(model)
    shape, autocast = source.image_shape(config.data.image_size), trainer.precision.autocast
    skips = config.train.skip_dropped_paths
    branches = [(None, images)] * objective.computes_main
    branches += [(sub_model.augmentation, sub_model.images_of(images)) for sub_model in objective.sub_models]
    activations = (max if objective.branch_by_branch else sum)(
        activation_memory(model, shape, seen, augmentation, autocast, skips) for augmentation, seen in branches
    )
    settings = config.distributed
    strategy = Strategy(is_sharded(settings, process), True, settings.reshard_after_forward, settings.reduce_dtype)
    step = build_step(config, source, process.world_size)
    kept = memory(strategy, step)
    average = [("  moving average", readable_size(kept["averages"]))] if kept["averages"] else []
    needed = readable_size(sum(kept.values()) + activations)
    return [
        ("memory per process", f"about {needed} of {readable_size(memory_of(process.device))}, of these"),
        ("  weights", readable_size(kept["parameters"])),
        ("  gradients", readable_size(kept["gradients"])),
        ("  optimiser states", f"not counted: {step.uncounted}" if step.uncounted else readable_size(kept["states"])),
        *average,
        ("  activations", f"{readable_size(activations)}, estimate for {images} images at once"),
    ]


def draw(config: Config, trainer: Trainer) -> Path:
    """The learning rate; where its picture is."""
    per_epoch, train, picture = trainer.data.iterations_per_epoch, config.train, RunFolder(config.output_dir).plan
    is_stopped = trainer.max_iterations < train.epochs * per_epoch
    figure = draw_schedule(
        build_schedule(config.schedule, config.optimizer, train.epochs, per_epoch, train.global_batch),
        steps_per_epoch=1 if config.schedule.unit == "epoch" else per_epoch,
        stop=trainer.max_iterations / per_epoch if is_stopped else None,
        full_rate=max(group["lr_scale"] for group in trainer.optimizer.param_groups),
        title=f"{Path(config.output_dir).name}: learning rate",
    )
    save(figure, picture)
    return picture
