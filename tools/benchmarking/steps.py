"""Training steps: a bare loop, timm's task, our trainer, and our trainer with every kind of sub-model.

And what all parts share: how contenders are timed in turns, and the lines of their tables.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any

import numpy as np
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.benchmark.utils.timer import timer
from tqdm import tqdm

import augsub
from engine.checkpoint import CheckpointStore
from engine.config import Config, SubModelConfig
from engine.config_file import CONFIGS, load_config, parse_config, to_yaml
from engine.data.source import build_source
from engine.defaults import build_model_optimizer, build_precision, build_trainer, complete, create_configured_model
from engine.distributed import Process
from engine.errors import InputError
from engine.hooks.training import LearningRateSchedule, NaNGuard
from engine.precision import compile_forward
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from models.complexity import analyze

CONFIG = CONFIGS / "_base_" / "benchmark.yaml"
BARE, TIMM, PLAIN, MASKED = "bare loop", "timm task", "our trainer", "masking 0.5"
MASKING, SKIPS, COMPILES = {"name": "masking", "ratio": 0.5}, {"skip_dropped_paths": True}, {"compile": True}
TRAINERS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {  # ours: sub-model, and keys of `train`
    PLAIN: (None, {}),
    MASKED: (MASKING, {}),
    "masking 0.5, windows left out": ({**MASKING, "mode": "drop_windows"}, {}),
    "random_crop 0.5": ({"name": "random_crop", "ratio": 0.5}, {}),
    "drop_path 0.2": ({"name": "drop_path", "ratio": 0.2}, {}),
    "drop_path 0.5, skipped": ({"name": "drop_path", "ratio": 0.5, "mode": "skip"}, {}),
    "dropout 0.2": ({"name": "dropout", "ratio": 0.2}, {}),
    "our trainer, paths skipped": (None, SKIPS),
    "masking 0.5, paths skipped": (MASKING, SKIPS),
    "our trainer, compiled": (None, COMPILES),
    "masking 0.5, compiled": (MASKING, COMPILES),
}
AGAINST = dict.fromkeys(TRAINERS, PLAIN) | {  # in the loaders' tables and those of whole runs, too
    **{TIMM: BARE, PLAIN: BARE, "masking 0.5, paths skipped": TIMM, "masking 0.5, compiled": MASKED},
    **{"our loader": "timm's create_loader", "shards": "class folders", "data.draft_decoding": "decoded whole"},
    "our run": "timm's loop",
}
Line = dict[str, Any]  # of a table, as the JSON file has it


def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of every step in every round; in each round all have their turn, every time another one first.

    Args:
        warm_up: rounds that are not counted.
        repeats: times that a step runs in its turn.
    """
    names, seconds = list(steps), {name: [] for name in steps}
    for number in tqdm(range(warm_up + rounds), unit="round", leave=False, disable=None):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = timer()  # when the GPU has nothing to do any more
            for _ in range(repeats):
                steps[name]()
            seconds[name].append((timer() - start) / repeats)
    return {name: of_rounds[warm_up:] for name, of_rounds in seconds.items()}


def compared(part: str, case: str, unit: str, rounds: Mapping[str, Sequence[float]]) -> dict[str, Line]:
    """By name the lines of what was measured in so many rounds on one `case`, without limits and notes.

    Each has the median, and the quartiles of the ratios to the paired rounds of what it stands `AGAINST`.
    """
    lines = {}
    for name, values in rounds.items():
        other = AGAINST[name] if AGAINST.get(name) in rounds else ""
        quartiles = np.quantile(np.divide(values, rounds[other]), (0.25, 0.5, 0.75)).tolist() if other else [None] * 3
        line = {"part": part, "case": case, "name": name, "value": float(np.median(values)), "unit": unit}
        ratio = dict(zip(("low", "ratio", "high"), quartiles, strict=True))
        lines[name] = line | ratio | {"against": other, "limit": None, "note": ""}
    return lines


def configuration(text: str, overrides: Sequence[str] = ()) -> Config:
    """What NAME:SIZE:BATCH asks for, with values of other keys."""
    name, *sizes = text.split(":")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise InputError(f"--models {text}: allowed is NAME:SIZE:BATCH, for example resnet50:224:64")
    keys = {"model.name": name, "data.image_size": sizes[0], "train.global_batch": sizes[1]}
    return complete(load_config(CONFIG, [*(f"{key}={value}" for key, value in keys.items()), *overrides]))


def title(config: Config) -> str:
    """The case that a configuration is."""
    train, precision = config.train, "fp32" if config.train.amp == "off" else config.train.amp
    switches = ["compiled" if train.compile is True else train.compile] * bool(train.compile) + [
        "channels_last"
    ] * train.channels_last
    size, batch = f"{config.data.image_size} px", f"batch {train.global_batch}"
    return ", ".join([config.model.name, size, batch, precision, *switches])


def measure_steps(config: Config, device: torch.device, rounds: int, only: Sequence[str] | None) -> list[Line]:
    """A step of everything that the model allows, or of `only` some of it, in turns.

    Raises:
        InputError: it does not allow them.
    """
    costs = training_costs(config)
    chosen = [name for name in costs if (COMPILES not in TRAINERS.get(name, ()) if only is None else name in only)]
    if not chosen or not set(only or ()) <= {*costs, *AGAINST}:
        raise InputError(f"--only {', '.join(only)}: {config.model.name} allows {', '.join(costs)}")
    steps = {name: step_of(name, config, device) for name in chosen}
    seconds = in_turns(
        steps, rounds, warm_up=3 if config.train.compile else 1, repeats=10 if device.type == "cuda" else 1
    )
    del steps
    gc.collect()  # so that the next case finds the memory free
    milliseconds = {name: [1e3 * second for second in of_rounds] for name, of_rounds in seconds.items()}
    lines = compared("steps", title(config), "ms", milliseconds)
    for name, line in lines.items():
        line["note"] = f"{1e3 * config.train.global_batch / line['value']:.4g} images/s"
        line["limit"] = costs[name] / costs[line["against"]] if line["against"] else None
    return list(lines.values())


def training_costs(config: Config) -> dict[str, float]:
    """The FLOPs of a step of all that the model allows, in parts of plain training's."""
    size, costs = config.data.image_size, {BARE: 1.0, TIMM: 1.0}
    with torch.device("meta"):
        model = create_configured_model(config, build_source(config))
    analyze(model, (3, size, size))  # ValueError for images that do not fit
    for name, (description, keys) in TRAINERS.items():
        if keys == SKIPS and not config.model.drop_path_rate:
            continue
        sub_models = [] if description is None else [augsub.build(description)]
        with suppress(ValueError):  # not with this model
            costs[name] = analyze(model, (3, size, size), sub_models, keys == SKIPS).training_cost
    return costs


def step_of(name: str, config: Config, device: torch.device) -> Callable[[], object]:
    """The next step, on one batch again and again."""
    batches = repeat(one_batch(config, device))
    if name in (BARE, TIMM):
        return plain_steps(name, config, device, batches).__next__
    trainer = trainer_of(name, config, device)
    trainer.batches = batches
    return trainer.run_iteration


def trainer_of(name: str, config: Config, device: torch.device, overrides: Sequence[str] = ()) -> Trainer:
    """Our trainer with the hooks that act at every step."""
    config, process = (
        parse_config(to_yaml(config), "the benchmark", overrides),
        Process(rank=0, world_size=1, device=device),
    )
    description, keys = TRAINERS[name]
    config.augsub.sub_models = [] if description is None else [SubModelConfig(augmentations=[description])]
    vars(config.train).update(keys)
    store = CheckpointStore(RunFolder(config.output_dir), process)  # nothing is written there
    trainer = build_trainer(config, build_source(config), process, store)
    trainer.hooks = [hook for hook in trainer.hooks if isinstance(hook, LearningRateSchedule | NaNGuard)]
    for hook in trainer.hooks:
        hook.before_train()
    return trainer


def one_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B,), always the same."""
    generator, batch, size = torch.Generator().manual_seed(0), config.train.global_batch, config.data.image_size
    images, labels = torch.randn(batch, 3, size, size, generator=generator), torch.arange(batch) % 10
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return images.to(device, memory_format=layout), labels.to(device)


def plain_steps(
    name: str, config: Config, device: torch.device, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """The step that everybody writes, or that of timm's train.py, with the optimiser and precision of our trainer."""
    precision = build_precision(config, Process(rank=0, world_size=1, device=device))
    model = create_configured_model(config, build_source(config)).to(device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer, criterion = build_model_optimizer(config.optimizer, model), nn.CrossEntropyLoss()
    task = ClassificationTask(model, criterion, device=device, verbose=False) if name == TIMM else None
    compile_forward(model, config.train.compile)
    scaler = precision.scaler
    for images, labels in batches:
        with precision.autocast():
            loss = criterion(model(images), labels) if task is None else task(images, labels)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield
