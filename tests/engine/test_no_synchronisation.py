"""Between two log periods a training step reads nothing back: the CPU never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint import CheckpointStore
from engine.config import AugsubConfig, Config, DataConfig, EmaConfig, MixupConfig, ModelConfig, SubModelConfig
from engine.config import TrainConfig as Train
from engine.data.source import IMAGENET
from engine.defaults import build_trainer
from engine.distributed import Process
from engine.hooks.training import ExponentialMovingAverage, LearningRateSchedule, NaNGuard
from engine.run_folder import RunFolder
from engine.trainer import Trainer

IMAGE_SIZE = 64
READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")  # operators with values for the CPU
MODELS = {
    "vit": ModelConfig(name="vit_tiny_patch16_224", kwargs={"depth": 2}),
    "swin": ModelConfig(name="swin_tiny_patch4_window7_224", kwargs={"depths": [1, 1], "num_heads": [3, 6]}),
    "resnet": ModelConfig(name="resnet10t"),
}
CONVERTING = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
READS = {
    "item": lambda loss: loss.item(),
    "boolean index": lambda loss: loss[loss > 0],
    "list": lambda loss: loss.tolist(),
}


class Operators(TorchDispatchMode):
    """Notes operators that read values, but for the optimiser's counters, which torch keeps on the CPU."""

    def __init__(self, trainer: Trainer, found: list[str]) -> None:
        super().__init__()
        self.states = trainer.optimizer.state
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or (name in READING and not any(args[0] is state["step"] for state in self.states.values())):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Conversions(TorchFunctionMode):
    """Notes what makes Python or NumPy values of tensors without an operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in CONVERTING:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def noted_reads(trainer: Trainer) -> Iterator[list[str]]:
    found: list[str] = []
    with Operators(trainer, found), Conversions(found):
        yield found


def make_trainer(model: str, folder) -> Trainer:
    """MaskSub with all that a step can have: mixing, clipping, stochastic depth, an average of the weights."""
    config = Config(
        output_dir=str(folder),
        model=MODELS[model],
        data=DataConfig(image_size=IMAGE_SIZE, workers=0),
        train=Train(global_batch=4, clip_norm=1.0),
        augsub=AugsubConfig(
            sub_models=[
                SubModelConfig(augmentations=[{"name": "masking", "ratio": 0.5}, {"name": "drop_path", "ratio": 0.2}]),
                SubModelConfig(augmentations=[{"name": "random_crop", "ratio": 0.5}]),
            ]
        ),
        mixup=MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0),
        ema=EmaConfig(enabled=True, warmup=True),
    )
    process = Process(0, 1, torch.device("cpu"))
    trainer = build_trainer(config, IMAGENET, process, CheckpointStore(RunFolder(folder), process))
    trainer.batches = repeat((torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), torch.arange(4)))
    of_a_step = [hook for hook in trainer.hooks if isinstance(hook, (LearningRateSchedule, ExponentialMovingAverage))]
    trainer.hooks = []
    trainer.register_hooks([*of_a_step, NaNGuard(config.log.period)])
    trainer._call("before_train")
    return trainer


def run_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.run_iteration()


@pytest.mark.parametrize("model", MODELS)
def test_a_step_reads_nothing_back(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    run_steps(trainer, 1)  # the first targets are looked at
    with noted_reads(trainer) as found:
        run_steps(trainer, 3)
    assert found == []
    for read in READS.values():  # which would have been noted
        with noted_reads(trainer) as found:
            read(trainer.last_loss)
        assert found
