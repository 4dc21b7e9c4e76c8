"""Training steps: a bare loop, timm's task, our trainer, and our trainer with every kind of sub-model."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

import augsub
from engine.checkpoint.store import CheckpointStore
from engine.config_file import load_config
from engine.data import build_source
from engine.defaults import build_precision, build_trainer
from engine.distributed import Process
from engine.hooks import LearningRateSchedule, NaNGuard
from engine.optim import build_optimizer
from engine.run_folder import RunFolder
from engine.run_model import complete
from engine.trainer import Trainer
from models.build import create_model
from models.complexity import analyze
from models.param_groups import param_groups
from tools.benchmark_figures import Figure, Step, in_turns, ratio_of
from tools.benchmark_synchronisation import count_synchronisations

CONFIG = Path(__file__).parent.parent / "configs" / "_base_" / "benchmark.yaml"
BARE, TIMM, PLAIN = "bare loop", "timm task", "our trainer"
SUB_MODELS = {
    "masking 0.5": "{name: masking, ratio: 0.5}",
    "masking 0.5, windows left out": "{name: masking, ratio: 0.5, mode: drop_windows}",
    "random_crop 0.5": "{name: random_crop, ratio: 0.5}",
    "drop_path 0.2": "{name: drop_path, ratio: 0.2}",
    "dropout 0.2": "{name: dropout, ratio: 0.2}",
}
NAMES = (BARE, TIMM, PLAIN, *SUB_MODELS)
CHEAP = ("masking 0.5, windows left out", "random_crop 0.5")
OVERHEAD, MASKSUB, HIERARCHICAL = 1.02, 1.05, 1.65  # targets: our trainer; beyond the FLOPs; a cheap sub-model
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 and fp16 FLOP/s of the SXM boards, NVIDIA


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    model: str
    image_size: int
    batch: int
    amp: str = "off"
    compiled: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        switches = [name for name in ("compiled", "channels_last") if getattr(self, name)]
        precision = "fp32" if self.amp == "off" else self.amp
        return ", ".join([self.model, f"{self.image_size} px", f"batch {self.batch}", precision, *switches])


@dataclass(frozen=True)
class Timing:
    """How often is measured, and where."""

    device: torch.device
    rounds: int
    warm_up: int
    repeats: int


def measure_steps(setting: Setting, timing: Timing, names: Sequence[str] | None = None) -> list[Figure]:
    """A step of everything that the model allows, or of `names` among it, in turns."""
    costs = training_costs(setting)
    chosen = [name for name in (BARE, TIMM, PLAIN, *costs) if names is None or name in names]
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            name: _step(name, setting, timing.device, Path(folder) / str(index)) for index, name in enumerate(chosen)
        }
        seconds = in_turns(steps, timing.rounds, timing.warm_up, timing.device, timing.repeats)
        is_gpu = timing.device.type == "cuda"  # on a CPU there is nothing to wait for
        waits = {name: count_synchronisations(step, timing.device) for name, step in steps.items() if is_gpu}
    del steps
    gc.collect()
    peak = peak_flops(setting, timing.device)
    figures = []
    for name in chosen:
        median = statistics.median(seconds[name])
        note = f"{setting.batch / median:.0f} images/s"
        cost = costs.get(name, Cost(costs.main, 1.0))
        if peak:
            note += f", MFU {100 * 3 * 2 * cost.main * cost.training * setting.batch / median / peak:.1f} %"
        if name in waits:
            note += f", {waits[name]} waits for the device"
        against = "" if name == BARE else BARE if name in (TIMM, PLAIN) else PLAIN
        limit = None if name == BARE else cost.training
        target = OVERHEAD if name == PLAIN else None
        if name in costs:
            target = min(MASKSUB * cost.training, HIERARCHICAL if _is_cheap(name, setting) else float("inf"))
        compared = ratio_of(seconds[name], seconds[against]) if against in seconds else {}
        figures.append(
            Figure("steps", str(setting), name, 1e3 * median, "ms", **compared, against=against, limit=limit,
                   target=target, note=note)
        )  # fmt: skip
    return figures


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the main model's forward for one image, and of a step in parts of plain training's."""

    main: int
    training: float


class Costs(dict[str, Cost]):
    """Of every sub-model that a model allows, by name."""

    main: int


def training_costs(setting: Setting) -> Costs:
    """By counting the FLOPs of the forwards; what the model does not allow is left out."""
    costs = Costs()
    model = create_model(setting.model, image_size=setting.image_size, num_classes=10)
    for name, spec in SUB_MODELS.items():
        config = load_config(CONFIG, [f"augsub.sub_models=[{{augmentations: [{spec}]}}]"])
        (augmentations,) = [sub.augmentations for sub in config.augsub.sub_models]
        try:
            found = analyze(model, (3, setting.image_size, setting.image_size), [augsub.build(augmentations)])
        except ValueError:
            continue
        costs.main = found.main.flops
        costs[name] = Cost(found.main.flops, found.training_cost)
    return costs


def peak_flops(setting: Setting, device: torch.device) -> float | None:
    """What the device could do in the setting's precision at most, if it is known."""
    if device.type != "cuda" or setting.amp == "off":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for board, flops in PEAK.items() if board in name), None)


def build(name: str, setting: Setting, device: torch.device, folder: Path) -> Trainer:
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
    config = load_config(CONFIG, overrides)
    complete(config)
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
        return build(name, setting, device, folder).run_iteration
    return _plain_steps(name, setting, device).__next__


def _plain_steps(name: str, setting: Setting, device: torch.device) -> Iterator[None]:
    """The step that everybody writes, or that of timm's train.py, with the optimiser and precision of our trainer."""
    config = load_config(CONFIG, [f"train.amp='{setting.amp}'"])
    precision = build_precision(config, Process(rank=0, world_size=1, device=device))
    model: nn.Module = create_model(setting.model, image_size=setting.image_size, num_classes=10).to(device)
    if setting.channels_last:
        model.to(memory_format=torch.channels_last)
    groups = param_groups(model, config.optimizer.weight_decay)
    optimizer = build_optimizer(config.optimizer, groups)
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


def _is_cheap(name: str, setting: Setting) -> bool:
    return name in CHEAP and setting.model.startswith(("swin", "resnet"))
