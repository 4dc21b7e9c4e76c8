"""Training steps: a bare loop, timm's task, our trainer, and our trainer with every kind of sub-model."""

from __future__ import annotations

import gc
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

import augsub
from engine.checkpoint import CheckpointStore
from engine.config import SubModelConfig
from engine.config_file import CONFIGS, load_config
from engine.data.datasets import build_source
from engine.defaults import build_model_optimizer, build_precision, build_trainer, complete
from engine.distributed import Process
from engine.errors import InputError
from engine.hooks.training import LearningRateSchedule, NaNGuard
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from models.build import build_on_meta, create_model
from models.complexity import analyze
from tools.benchmarking.measurements import Measurement, Setting, compared, in_turns

CONFIG = CONFIGS / "_base_" / "benchmark.yaml"
BARE, TIMM, PLAIN, MASKED = "bare loop", "timm task", "our trainer", "masking 0.5"
SUB_MODELS = {
    MASKED: {"name": "masking", "ratio": 0.5},
    "masking 0.5, windows left out": {"name": "masking", "ratio": 0.5, "mode": "drop_windows"},
    "random_crop 0.5": {"name": "random_crop", "ratio": 0.5},
    "drop_path 0.2": {"name": "drop_path", "ratio": 0.2},
    "dropout 0.2": {"name": "dropout", "ratio": 0.2},
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 and fp16 FLOP/s of the SXM boards, NVIDIA


def measure_steps(setting: Setting, rounds: int, only: Sequence[str] | None) -> list[Measurement]:
    """A step of everything that the model allows, or of `only` some of it, in turns.

    Raises:
        InputError: it does not allow them.
    """
    flops, costs = training_costs(setting)
    chosen = [name for name in costs if only is None or name in only]
    if not chosen or not set(only or ()) <= {*costs, *SUB_MODELS}:
        raise InputError(f"--only {', '.join(only)}: {setting.model} allows {', '.join(costs)}")
    is_gpu = setting.device.type == "cuda"
    warm_up, repeats = 3 if setting.compiled else 1, 10 if is_gpu else 1
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: _step(name, setting, Path(folder) / str(number)) for number, name in enumerate(chosen)}
        seconds = in_turns(steps, rounds, warm_up, setting.device, repeats)
        # on a CPU there is nothing to wait for
        waits = {name: f", {count_waits(step)} waits for the device" for name, step in steps.items() if is_gpu}
    del steps
    gc.collect()  # so that the next setting finds the memory free
    board = torch.cuda.get_device_name() if is_gpu and setting.amp != "off" else ""
    peak = next((peak for name, peak in PEAK.items() if name in board), None)
    notes = {}
    for name in chosen:
        speed = setting.batch / statistics.median(seconds[name])  # images/s
        # a multiply-add is two FLOPs, a backward two forwards
        mfu = "" if peak is None else f", MFU {100 * 3 * 2 * flops * costs[name] * speed / peak:.1f} %"
        notes[name] = f"{speed:.0f} images/s{mfu}{waits.get(name, '')}"
    against = dict.fromkeys(SUB_MODELS, PLAIN) | {TIMM: BARE, PLAIN: BARE}
    limits = {name: cost for name, cost in costs.items() if name != BARE}
    milliseconds = {name: [1e3 * second for second in of_rounds] for name, of_rounds in seconds.items()}
    return compared("steps", str(setting), "ms", milliseconds, against, limits, notes)


def training_costs(setting: Setting) -> tuple[int, dict[str, float]]:
    """Multiply-adds of the main model for one image; and for all that the model allows a step in parts of plain's."""
    model = build_on_meta(setting.model, image_size=setting.image_size, num_classes=10)
    shape = (3, setting.image_size, setting.image_size)
    costs = dict.fromkeys((BARE, TIMM, PLAIN), 1.0)
    for name, description in SUB_MODELS.items():
        try:
            costs[name] = analyze(model, shape, [augsub.build(description)]).training_cost
        except ValueError:  # not with this model
            continue
    return analyze(model, shape, []).main.flops, costs


def trainer_on_one_batch(name: str, setting: Setting, folder: Path) -> Trainer:
    """Our trainer on one batch again and again, with the hooks that act at every step."""
    config = load_config(CONFIG)
    config.output_dir, config.model.name, config.data.image_size = str(folder), setting.model, setting.image_size
    train = config.train
    train.global_batch, train.amp, train.compile = setting.batch, setting.amp, setting.compiled
    train.channels_last = setting.channels_last
    if name in SUB_MODELS:
        config.augsub.sub_models = [SubModelConfig(augmentations=[SUB_MODELS[name]])]
    config, process = complete(config), Process(rank=0, world_size=1, device=setting.device)
    trainer = build_trainer(config, build_source(config), process, CheckpointStore(RunFolder(folder), process))
    trainer.hooks = [hook for hook in trainer.hooks if isinstance(hook, LearningRateSchedule | NaNGuard)]
    for hook in trainer.hooks:
        hook.before_train()
    trainer.batches = repeat(batch_of(setting))
    return trainer


def batch_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B,), always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, generator=generator).to(
        setting.device
    )
    labels = torch.randint(10, (setting.batch,), generator=generator).to(setting.device)
    return (images.contiguous(memory_format=torch.channels_last) if setting.channels_last else images), labels


def _step(name: str, setting: Setting, folder: Path) -> Callable[[], object]:
    if name not in (BARE, TIMM):
        return trainer_on_one_batch(name, setting, folder).run_iteration
    return _plain_steps(name, setting).__next__


def _plain_steps(name: str, setting: Setting) -> Iterator[None]:
    """The step that everybody writes, or that of timm's train.py, with the optimiser and precision of our trainer."""
    config = load_config(CONFIG)
    config.train.amp = setting.amp
    precision = build_precision(config, Process(rank=0, world_size=1, device=setting.device))
    model: nn.Module = create_model(setting.model, image_size=setting.image_size, num_classes=10).to(setting.device)
    if setting.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer, criterion = build_model_optimizer(config.optimizer, model), nn.CrossEntropyLoss()
    task = ClassificationTask(model, criterion, device=setting.device, verbose=False) if name == TIMM else None
    if setting.compiled:
        model.compile()
    images, labels = batch_of(setting)
    scaler = precision.scaler
    while True:
        with precision.autocast():
            loss = criterion(model(images), labels) if task is None else task(images, labels)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield


def count_waits(step: Callable[[], object]) -> int:
    """How often a step makes the program wait for the GPU, as CUDA itself reports it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
