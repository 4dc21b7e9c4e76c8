"""Steps on a GPU: the numbers of the CPU, precisions, compilation, groups of processes, waits, memory."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing import ProcessRaisedException, spawn
from torch.nn.parallel import DistributedDataParallel

import augsub
from augsub import SubModel, SubModelObjective
from engine.checkpoint import CheckpointStore
from engine.config import Config
from engine.config_file import load_config
from engine.data.source import build_source
from engine.defaults import build_trainer, complete
from engine.distributed import Process, shard, synchronise_batchnorm
from engine.evaluation.metrics import evaluate
from engine.hooks.training import ExponentialMovingAverage, LearningRateSchedule, NaNGuard
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from models.build import innermost_blocks
from models.pictures import record

pytestmark = pytest.mark.gpu
VIT = {"img_size": 32, "patch_size": 8, "depth": 2}
GEMMA = {"embed_dim": 48, "depth": 2, "num_heads": 3, "head_dim": 16, "intermediate_size": 96}
FAMILIES = {  # a file of augsub/families each, the ways in which sub-models are made; and pixels
    "vit": ("vit_tiny_patch16_224", VIT, 32),
    "eva": ("eva02_tiny_patch14_224", VIT, 32),
    "hiera": ("hiera_tiny_224", {"img_size": 64}, 64),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 224),
    "crossvit": ("crossvit_tiny_240", {}, 240),
    "gemma4": ("gemma4_vit_167m", GEMMA, 64),
    "convnext": ("convnext_atto", {}, 64),
    "resnet": ("resnet10t", {}, 64),
}
AUGMENTATIONS = {"masking": 0.5, "random_crop": 0.5, "drop_path": 0.2, "dropout": 0.2}
DIGITS = {"vit": "digits_vit", "swin": "digits_swin", "resnet": "digits_resnet"}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions of a GPU round to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers of the CPU wherever they are wanted: those of a GPU are others."""
    functions = {name: getattr(torch, name) for name in ("rand", "randint", "randperm")}
    bernoulli = Tensor.bernoulli_  # of stochastic depth
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in functions.items():

            def drawn(*size, draw=draw, device=None, **kwargs):
                return draw(*size, **kwargs).to(device or "cpu")

            patch.setattr(torch, name, drawn)
        patch.setattr(Tensor, "bernoulli_", lambda into, p=0.5: into.copy_(bernoulli(torch.empty(into.shape), p)))
        yield


def make_model(family: str) -> tuple[nn.Module, int]:
    """A small model, patched, and the side of its images in pixels."""
    name, kwargs, size = FAMILIES[family]
    return augsub.patch(timm.create_model(name, num_classes=10, **kwargs)), size


def masksub_step(family: str, augmentation: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What became of every pixel; the losses; all gradients, of one step in float32."""
    torch.manual_seed(0)
    model, size = make_model(family)
    model.to(device).train()
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    objective = SubModelObjective(nn.CrossEntropyLoss(), [SubModel(augmentation, AUGMENTATIONS[augmentation])])
    objective.prepare(model)
    with same_draws():
        states = record(model, images, objective.sub_models[0].augmentation, seed=2).states
        torch.manual_seed(2)
        out = objective.backward(model, images, torch.arange(4, device=device))
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return states.cpu(), torch.stack([out.main_loss, *out.sub_losses]).detach().cpu(), torch.cat(gradients).cpu()


@pytest.mark.parametrize("augmentation", ["masking", "random_crop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_losses_and_gradients_are_those_of_the_cpu(device, family, augmentation):
    states, losses, gradients = masksub_step(family, augmentation, device)
    expected_states, expected_losses, expected = masksub_step(family, augmentation, torch.device("cpu"))
    assert torch.equal(states, expected_states) and states.any()
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-4)
    assert (gradients - expected).norm() < 1e-2 * expected.norm()


def digits_trainer(device: torch.device, folder: Path, model: str = "vit", *overrides: str) -> Trainer:
    """The trainer of a digits configuration, at its first step."""
    config: Config = complete(load_config(DIGITS[model], [f"output_dir={folder}", "data.workers=0", *overrides]))
    process = Process(0, 1, device)
    trainer = build_trainer(config, build_source(config), process, CheckpointStore(RunFolder(folder), process))
    every_step = (LearningRateSchedule, ExponentialMovingAverage, NaNGuard)
    trainer.hooks = [hook for hook in trainer.hooks if isinstance(hook, every_step)]
    trainer.batches = trainer.data.train_from(0)
    trainer._call("before_train")
    return trainer


def run(trainer: Trainer, steps: int) -> list[float]:
    """The main model's losses of some steps."""
    found = []
    for _ in range(steps):
        trainer.run_iteration()
        found.append(trainer.means.read()["main_loss"])
    return found


@pytest.mark.parametrize("setting", ["amp=bf16", "amp=fp16", "channels_last=true", "grad_checkpointing=true"])
@pytest.mark.parametrize("model", DIGITS)
def test_precisions_and_layouts_change_rounding_alone(device, tmp_path, model, setting):
    if model == "resnet" and setting.startswith("grad"):
        setting = "amp=off"
    plain = run(digits_trainer(device, tmp_path / "plain", model), 5)
    assert run(digits_trainer(device, tmp_path / "other", model, f"train.{setting}"), 5) == pytest.approx(
        plain, rel=0.03
    )


def test_the_average_is_that_of_the_steps(device, tmp_path):
    trainer = digits_trainer(device, tmp_path, "vit", "ema.enabled=true", "ema.decay=0.9", "ema.warmup=false")
    average = next(hook for hook in trainer.hooks if isinstance(hook, ExponentialMovingAverage)).ema.module
    expected = {name: weight.detach().clone() for name, weight in trainer.bare_model.named_parameters()}
    for _ in range(3):
        trainer.run_iteration()
        for name, weight in trainer.bare_model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * weight.detach()
    torch.testing.assert_close(dict(average.named_parameters()), expected)


def test_an_overflow_leaves_the_step_out_and_halves_the_scale(device, tmp_path):
    trainer = digits_trainer(device, tmp_path, "vit", "train.amp=fp16", "train.loss_scale=1.0e+12", "log.period=1000")
    scaler = trainer.precision.scaler
    before = {name: tensor.clone() for name, tensor in trainer.bare_model.state_dict().items()}
    run(trainer, 1)
    after = trainer.bare_model.state_dict()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    assert unchanged == scaler.is_enabled() == (device.type == "cuda")
    assert scaler.get_scale() == (5e11 if device.type == "cuda" else 1.0)
    losses = run(trainer, 60)
    assert losses[-1] < losses[0] and scaler.get_scale() >= 1


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_nothing_is_compiled_again_after_the_first_steps(device, tmp_path, augmentation, report):
    torch._dynamo.reset()
    sub_model = (
        f"augsub.sub_models=[{{augmentations: [{{name: {augmentation}, ratio: {AUGMENTATIONS[augmentation]}}}]}}]"
    )
    small = ("train.compile=true", "model.kwargs.depth=1", "model.drop_path_rate=0.1", sub_model)
    trainer = digits_trainer(device, tmp_path, "vit", *small)
    run(trainer, 3)
    graphs = counters["stats"]["unique_graphs"]
    run(trainer, trainer.data.iterations_per_epoch)
    assert counters["stats"]["unique_graphs"] == graphs >= 1
    report(f"{augmentation}: {graphs} graphs compiled, none of them after the third step")


def test_captured_steps_are_the_same_steps(device, tmp_path):
    """CUDA graphs, with two branches and two micro-batches in a step, and an evaluation in between."""
    torch._dynamo.reset()
    sub_model = "augsub.sub_models=[{augmentations: [{name: downscale, ratio: 0.5}]}]"  # draws nothing
    settings = (sub_model, "train.accumulation=2", "model.kwargs.depth=2", "model.kwargs.patch_size=1")
    found = []
    for mode in ("false", "reduce-overhead"):
        trainer = digits_trainer(device, tmp_path / mode, "vit", *settings, f"train.compile={mode}")
        losses = run(trainer, 6)
        figures = evaluate(trainer.bare_model, trainer.data.held_out, trainer.precision, trainer.process)
        found.append([*losses, *run(trainer, 6), figures["eval_loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.fixture(scope="module")
def group(device, tmp_path_factory) -> Iterator[Process]:
    """The process group of this process alone: NCCL on a GPU."""
    store = tmp_path_factory.mktemp("group") / "store"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield Process(0, 1, device, dist.new_group(backend="gloo"))
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_a_wrapped_model_has_the_gradients_of_the_bare_one(group, device, family, strategy):
    def gradients(wrap) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, size = make_model(family)
        model.to(device)
        objective = SubModelObjective(nn.CrossEntropyLoss(), [SubModel("masking", 0.5), SubModel("drop_path", 0.2)])
        wrapped = wrap(objective.prepare(model))
        torch.manual_seed(1)
        objective.backward(wrapped, torch.randn(4, 3, size, size, device=device), torch.arange(4, device=device))
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}

    def wrapping(model: nn.Module) -> nn.Module:
        if strategy == "fsdp2":
            return shard(model, innermost_blocks(model), group, reshard_after_forward=True)
        return DistributedDataParallel(model, device_ids=[device.index or 0] if device.type == "cuda" else None)

    torch.testing.assert_close(gradients(wrapping), gradients(lambda model: model), rtol=1e-3, atol=1e-5)


def synchronised(rank: int, device: torch.device, backend: str, store: str, seen: Any) -> None:
    """One of two processes, with half of the images each; running statistics go into `seen`."""
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    device = torch.device("cuda", rank % torch.cuda.device_count()) if device.type == "cuda" else device
    seen[rank] = batchnorm_statistics(device, slice(rank, None, 2), Process(rank, 2, device))
    dist.destroy_process_group()


def batchnorm_statistics(device: torch.device, share: slice, process: Process) -> dict[str, Tensor]:
    """Running statistics after a forward of a share of always the same images."""
    torch.backends.cudnn.allow_tf32 = False  # in a process of its own, which no fixture reaches
    torch.manual_seed(0)
    images = torch.randn(8, 3, 64, 64)[share].to(device)
    model = synchronise_batchnorm(timm.create_model("resnet10t", num_classes=10).to(device), process)
    model.train()(images)
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}


def test_synchronised_batchnorm_sees_the_images_of_all_processes(device, tmp_path):
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"  # NCCL has no two processes on one GPU
    with multiprocessing.get_context("spawn").Manager() as manager:
        seen = manager.dict()
        # torch has it for GPUs only, and says so
        refused = pytest.raises(ProcessRaisedException, match="BatchNorm on GPUs only")
        with nullcontext() if device.type == "cuda" else refused:
            spawn(synchronised, (device, backend, str(tmp_path / "store"), seen), nprocs=2)
        whole = batchnorm_statistics(device, slice(None), Process(0, 1, device))
        for statistics in seen.values():
            torch.testing.assert_close(statistics, whole, rtol=1e-3, atol=1e-5)


def count_waits(step: Callable[[], object]) -> int:
    """How often a step makes the program wait for the GPU, as CUDA itself reports it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


CELL = {"vit": "", "swin": ", cell: 2", "resnet": ""}  # of so few pixels


@pytest.mark.parametrize("model", DIGITS)
def test_a_step_never_waits_for_the_device(device, tmp_path, model):
    """With all that a step can have."""
    masked = f"{{augmentations: [{{name: masking, ratio: 0.5{CELL[model]}}}, {{name: drop_path, ratio: 0.2}}]}}"
    sub_models = f"augsub.sub_models=[{masked}, {{augmentations: [{{name: random_crop, ratio: 0.5}}]}}]"
    everything = ("train.amp=bf16", "train.clip_norm=1.0", "ema.enabled=true", "mixup.mixup_alpha=0.8", sub_models)
    other = ("model.drop_path_rate=0.1", "log.period=1000", *(["data.image_size=64"] if model == "resnet" else []))
    trainer = digits_trainer(device, tmp_path, model, *everything, *other)
    trainer.batches = repeat(next(trainer.batches))
    run(trainer, 2)
    waits = count_waits(trainer.run_iteration) if device.type == "cuda" else trainer.run_iteration()
    assert not waits


def test_a_sub_model_needs_no_more_memory_than_its_main_model_and_the_gradient(device, report):
    name, kwargs, size = ("vit_base_patch16_224", {}, 224) if device.type == "cuda" else FAMILIES["vit"]
    batch = 64 if device.type == "cuda" else 4
    peaks = {}
    for way, sub_models in {"plain": [], "MaskSub": [SubModel("masking", 0.5)]}.items():
        gc.collect()  # a patched model refers to itself: the one before may still be there
        model = augsub.patch(timm.create_model(name, **kwargs)).to(device)
        objective = SubModelObjective(nn.CrossEntropyLoss(), sub_models)
        objective.prepare(model)
        images, labels = torch.randn(batch, 3, size, size, device=device), torch.zeros(batch, device=device).long()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        objective.backward(model, images, labels)
        peaks[way] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1
        gradient = sum(4 * parameter.numel() for parameter in model.parameters())
        del model, objective
    found = ", ".join(f"{peak / 1e9:.2f} GB {way}" for way, peak in peaks.items())
    report(f"peak memory of {name}, batch {batch}, float32: {found}")
    assert peaks["MaskSub"] <= peaks["plain"] + gradient
