"""The gradient's norm in the records, and the warning of sub-models that drown the main model."""

from __future__ import annotations

import logging
from itertools import repeat

import pytest
import torch

from engine.checkpoint import CheckpointStore
from engine.config import AugsubConfig, Config, DataConfig, ModelConfig, OptimizerConfig, SubModelConfig
from engine.config import TrainConfig as Train
from engine.data.source import IMAGENET
from engine.defaults import build_trainer
from engine.distributed import Process
from engine.hooks.training import GradientNorm
from engine.precision import Precision
from engine.run_folder import RunFolder
from engine.train_loop import HookBase
from engine.trainer import Trainer
from tools.comparison.branch_gradients import BranchGradients

IMAGE_SIZE = 64


class Gradients(HookBase):
    """Notes the whole gradient after each backward of a step."""

    def before_step(self):
        self.noted = []

    def after_backward(self):
        parameters = self.trainer.bare_model.parameters()
        self.noted.append(torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None]))


def run_steps(
    folder,
    model: str,
    augmentation: dict,
    count: int,
    period: int,
    scale: float | None = None,
    hook=GradientNorm,
    **train,
) -> tuple[Trainer, Gradients]:
    config = Config(
        output_dir=str(folder),
        model=ModelConfig(name=model),
        data=DataConfig(image_size=IMAGE_SIZE, workers=0),
        train=Train(global_batch=8, **train),
        optimizer=OptimizerConfig(lr=1e-9),  # the same gradients at every step
        augsub=AugsubConfig(sub_models=[SubModelConfig(augmentations=[augmentation])]),
    )
    process = Process(0, 1, torch.device("cpu"))
    trainer = build_trainer(config, IMAGENET, process, CheckpointStore(RunFolder(folder), process))
    torch.manual_seed(0)
    size = trainer.data.micro_batch
    trainer.batches = repeat((torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE), torch.arange(size)))
    if scale is not None:  # a CPU's run has float32 in place of fp16
        trainer.precision = Precision("fp16", process.device, loss_scale=scale)
    trainer.hooks, probe = [], Gradients()
    trainer.register_hooks([hook(period), probe])
    trainer._call("before_train")
    for _ in range(count):
        trainer.run_iteration()
    return trainer, probe


@pytest.mark.parametrize(("accumulation", "scale"), [(1, None), (2, None), (1, 64.0)])
def test_the_norm_is_that_of_a_logged_step_before_clipping_and_scaling(accumulation, scale, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "engine")
    settings = {"clip_norm": 1e-3, "accumulation": accumulation, "scale": scale}
    for count, is_recorded in ((1, False), (2, True), (3, False)):
        masking = {"name": "masking", "ratio": 0.5}
        trainer, probe = run_steps(tmp_path / str(count), "test_vit", masking, count, period=2, **settings)
        assert len(probe.noted) == 2 * accumulation
        assert ("grad_norm" in trainer.results) == is_recorded
        if is_recorded:
            expected = float(probe.noted[-1].norm()) / (scale or 1)
            assert trainer.results["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert caplog.messages == []  # none drowns the main model


@pytest.mark.parametrize(("accumulation", "scale"), [(1, None), (2, 64.0)])
def test_a_study_records_the_gradient_of_each_branch(accumulation, scale, tmp_path):
    """Of the first micro-batch, without weight and scale; a mask token learns in the sub-model alone."""
    for model, cell in (("test_vit", None), ("test_convnext", 16)):
        masking = {"name": "masking", "ratio": 0.5, **({"cell": cell} if cell else {})}
        settings = {"accumulation": accumulation, "scale": scale, "hook": BranchGradients}
        trainer, probe = run_steps(tmp_path / model, model, masking, 2, period=2, **settings)
        main, both = probe.noted[:2]
        if len(main) < len(both):
            token = trainer.bare_model.mask_token.numel()
            names = [name for name, _ in trainer.bare_model.named_parameters()]
            start = sum(w.numel() for w in list(trainer.bare_model.parameters())[: names.index("mask_token")])
            main = torch.cat([main[:start], torch.zeros(token), main[start:]])
        factor = accumulation / (scale or 1) / 0.5
        assert trainer.results["main_grad_norm"] == pytest.approx(factor * float(main.norm()), rel=1e-5)
        assert trainer.results["sub_grad_norm"] == pytest.approx(factor * float((both - main).norm()), rel=1e-5)


def test_a_sub_model_that_drowns_the_main_model_is_told_once(tmp_path, caplog):
    """Zeroed cells of a ConvNeXt meet a stem without bias: its norm divides the gradient by almost nothing."""
    caplog.set_level(logging.WARNING, "engine")
    zeroing = {"name": "masking", "ratio": 0.5, "mode": "zero_pixels"}
    _, probe = run_steps(tmp_path, "test_convnext", zeroing, count=2, period=2)  # the first step and the second
    main, both = probe.noted
    assert (both - main).norm() > 100 * main.norm()
    (line,) = caplog.messages
    assert "iteration 1" in line and "sub-model 0, masking 0.5" in line
