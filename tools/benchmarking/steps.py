"""Training steps: a bare loop, timm's task, our trainer, and our trainer with every kind of sub-model."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from engine.checkpoint import CheckpointStore
from engine.config_file import load_config
from engine.data import build_source
from engine.defaults import build_model_optimizer, build_precision, build_trainer, complete
from engine.distributed import Process
from engine.errors import InputError
from engine.hooks.training import LearningRateSchedule, NaNGuard
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from models.build import create_model
from tools.benchmarking.costs import CONFIG, SUB_MODELS, Costs, Setting, peak_flops, training_costs
from tools.benchmarking.figures import Figure, Step, in_turns, ratio_of
from tools.benchmarking.synchronisation import count_synchronisations

BARE, TIMM, PLAIN = "bare loop", "timm task", "our trainer"
NAMES = (BARE, TIMM, PLAIN, *SUB_MODELS)
CHEAP = ("masking 0.5, windows left out", "random_crop 0.5")
OVERHEAD, MASKSUB, HIERARCHICAL = 1.02, 1.05, 1.65  # targets: our trainer; beyond the FLOPs; a cheap sub-model


@dataclass(frozen=True)
class Timing:
    """How often is measured, and where."""

    device: torch.device
    rounds: int
    warm_up: int
    repeats: int


def measure_steps(setting: Setting, timing: Timing, names: Sequence[str] | None) -> list[Figure]:
    """A step of everything that the model allows, or of `names` among it, in turns.

    Raises:
        InputError: it allows none of them.
    """
    costs = training_costs(setting)
    allowed = (BARE, TIMM, PLAIN, *costs.ratios)
    chosen = [name for name in allowed if names is None or name in names]
    if not chosen:
        raise InputError(f"--only {', '.join(names)}: {setting.model} allows {', '.join(allowed)}")
    seconds, waits = _take_turns(chosen, setting, timing)
    peak = peak_flops(setting, timing.device)
    return [
        Figure(
            part="steps",
            case=str(setting),
            name=name,
            value=1e3 * statistics.median(seconds[name]),
            unit="ms",
            limit=None if name == BARE else costs.ratio(name),
            target=_target(name, setting, costs),
            note=_note(setting.batch / statistics.median(seconds[name]), costs.flops(name), peak, waits.get(name)),
            **_compared(name, seconds),
        )
        for name in chosen
    ]


def _take_turns(
    names: Sequence[str], setting: Setting, timing: Timing
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round, and on a GPU how often a step waits for it; on a CPU there is nothing to wait for."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            name: _step(name, setting, timing.device, Path(folder) / str(index)) for index, name in enumerate(names)
        }
        seconds = in_turns(steps, timing.rounds, timing.warm_up, timing.device, timing.repeats)
        is_gpu = timing.device.type == "cuda"
        waits = {name: count_synchronisations(step) for name, step in steps.items() if is_gpu}
    del steps
    gc.collect()  # so that the next setting finds the memory free
    return seconds, waits


def _compared(name: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The line that this one is compared with, and the ratio, as fields of a `Figure`."""
    against = BARE if name in (TIMM, PLAIN) else PLAIN
    if name == BARE or against not in seconds:
        return {}
    return {"against": against, **ratio_of(seconds[name], seconds[against])}


def _target(name: str, setting: Setting, costs: Costs) -> float | None:
    if name in (BARE, TIMM):
        return None
    if name == PLAIN:
        return OVERHEAD
    is_cheap = name in CHEAP and setting.model.startswith(("swin", "resnet"))
    return min(MASKSUB * costs.ratio(name), HIERARCHICAL if is_cheap else float("inf"))


def _note(images_per_second: float, flops: float, peak: float | None, waits: int | None) -> str:
    words = [f"{images_per_second:.0f} images/s"]
    if peak is not None:
        words.append(f"MFU {100 * images_per_second * flops / peak:.1f} %")
    if waits is not None:
        words.append(f"{waits} waits for the device")
    return ", ".join(words)


def trainer_on_one_batch(name: str, setting: Setting, device: torch.device, folder: Path) -> Trainer:
    """Our trainer on one batch again and again, with the hooks that act at every step."""
    sub_models = f"[{{augmentations: [{SUB_MODELS[name]}]}}]" if name in SUB_MODELS else "[]"
    overrides = [
        f"output_dir={folder}",
        f"model.name={setting.model}",
        f"data.image_size={setting.image_size}",
        f"train.global_batch={setting.batch}",
        f"train.amp='{setting.amp}'",
        f"train.compile={setting.compiled}",
        f"train.channels_last={setting.channels_last}",
        f"augsub.sub_models={sub_models}",
    ]
    config = complete(load_config(CONFIG, overrides))
    process = Process(rank=0, world_size=1, device=device)
    store = CheckpointStore(RunFolder(config.output_dir), process)
    trainer = build_trainer(config, build_source(config), process, store)
    trainer.hooks = [hook for hook in trainer.hooks if isinstance(hook, LearningRateSchedule | NaNGuard)]
    for hook in trainer.hooks:
        hook.before_train()
    trainer.batches = repeat(batch_of(setting, device))
    return trainer


def batch_of(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B,), always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, generator=generator).to(device)
    labels = torch.randint(10, (setting.batch,), generator=generator).to(device)
    return (images.contiguous(memory_format=torch.channels_last) if setting.channels_last else images), labels


def _step(name: str, setting: Setting, device: torch.device, folder: Path) -> Step:
    if name not in (BARE, TIMM):
        return trainer_on_one_batch(name, setting, device, folder).run_iteration
    return _plain_steps(name, setting, device).__next__


def _plain_steps(name: str, setting: Setting, device: torch.device) -> Iterator[None]:
    """The step that everybody writes, or that of timm's train.py, with the optimiser and precision of our trainer."""
    config = load_config(CONFIG, [f"train.amp='{setting.amp}'"])
    precision = build_precision(config, Process(rank=0, world_size=1, device=device))
    model: nn.Module = create_model(setting.model, image_size=setting.image_size, num_classes=10).to(device)
    if setting.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_model_optimizer(config.optimizer, model)
    criterion = nn.CrossEntropyLoss()
    task = ClassificationTask(model, criterion, device=device, verbose=False) if name == TIMM else None
    if setting.compiled:
        model.compile()
    images, labels = batch_of(setting, device)
    scaler = precision.scaler
    while True:
        with precision.autocast():
            loss = criterion(model(images), labels) if task is None else task(images, labels)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield
