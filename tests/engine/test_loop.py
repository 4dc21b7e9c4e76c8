"""The loop and its hooks, precision, and what is measured during a run."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from augsub import SubModelObjective
from engine.distributed import Process
from engine.errors import InputError
from engine.precision import Precision
from engine.train_loop import HookBase, TrainerBase
from engine.trainer import RunningMeans, Trainer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ALONE = Process(rank=0, world_size=1, device=CPU)
POINTS = ("before_train", "before_step", "after_step", "after_train", "close")


class Recorder(HookBase):
    """Notes where it is called."""

    def __init__(self, name: str, calls: list) -> None:
        for point in POINTS:
            setattr(self, point, lambda point=point: calls.append((name, point, self.trainer.iteration)))


class Loop(TrainerBase):
    def __init__(self, calls: list, fails: bool = False) -> None:
        super().__init__(max_iterations=2)
        self.calls, self.fails = calls, fails

    def run_step(self):
        self.calls.append(("", "run_step", self.iteration))
        if self.fails:
            raise RuntimeError("fault")


def test_hooks_run_in_list_order_around_every_step_and_are_closed_after_an_error():
    calls: list = []
    loop = Loop(calls)
    loop.register_hooks([Recorder("a", calls), Recorder("b", calls)])
    loop.train()
    expected = [("before_train", 0)]
    for done in range(2):
        expected += [("before_step", done), ("run_step", done), ("after_step", done + 1)]
    expected += [("after_train", 2), ("close", 2)]
    assert calls == [
        (name, point, done) for point, done in expected for name in ([""] if point == "run_step" else ["a", "b"])
    ]
    calls.clear()
    loop = Loop(calls, fails=True)
    loop.register_hooks([Recorder("a", calls)])
    with pytest.raises(RuntimeError, match="fault"):
        loop.train()
    assert [point for _, point, _ in calls] == ["before_train", "before_step", "run_step", "close"]


def test_fp16_scales_gradients_and_leaves_an_overflowing_step_out():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision("fp16", CPU)
    precision.backward(model(torch.ones(1, 1)).sum())
    assert model.weight.grad.item() == 65536
    precision.step(optimizer)
    assert model.weight.item() == pytest.approx(0.0)
    precision.backward(model(torch.full((1, 1), float("inf"))).sum())
    precision.step(optimizer)
    assert model.weight.item() == pytest.approx(0.0)
    assert precision.scaler.get_scale() == 32768
    resumed = Precision("fp16", CPU)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.scaler.get_scale() == 32768


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_clipping_limits_the_unscaled_norm(amp):
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(amp, CPU, clip_norm=0.5)
    with precision.autocast():
        loss = 0.25 * model(torch.full((1, 4), 2.0)).float().sum()  # a gradient of norm 1, small enough for fp16
        precision.backward(loss)  # as the objective does it: inside the forward's context
    precision.step(optimizer)
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-3)
    assert model.weight.grad is None


class Unsynchronised(nn.Linear):
    """Counts the backwards that DistributedDataParallel would keep to itself."""

    count = 0

    @contextmanager
    def no_sync(self):
        self.count += 1
        yield


def make_trainer(accumulation: int = 1, precision: Precision | None = None) -> Trainer:
    """Plain training of a linear model, one step on 8 vectors."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    model = Unsynchronised(4, 3, bias=False)
    nn.init.normal_(model.weight, generator=generator)
    return Trainer(
        model=model,
        bare_model=model,
        objective=SubModelObjective(nn.CrossEntropyLoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        data=SimpleNamespace(
            max_iterations=1,
            iterations_per_epoch=4,
            accumulation=accumulation,
            train_from=lambda done: (
                batch for batch in zip(images.split(8 // accumulation), labels.split(8 // accumulation), strict=True)
            ),
        ),
        precision=precision or Precision("off", CPU),
        process=ALONE,
        mix=None,
        seed=0,
    )


def test_accumulated_micro_batches_are_one_batch():
    whole, parts = make_trainer(), make_trainer(accumulation=4)
    for trainer in (whole, parts):
        trainer.train()
    torch.testing.assert_close(parts.bare_model.state_dict(), whole.bare_model.state_dict())
    torch.testing.assert_close(parts.last_loss, whole.last_loss)
    assert parts.means.read() == pytest.approx(whole.means.read()) and whole.epoch == 0.25
    assert (whole.model.count, parts.model.count) == (0, 3)  # the last one synchronises


def test_a_trainer_takes_up_the_state_of_another_one():
    trained = make_trainer(precision=Precision("fp16", CPU, loss_scale=8.0))
    trained.train()
    resumed = make_trainer(precision=Precision("fp16", CPU))
    resumed.load_state_dict(deepcopy(trained.state_dict()), Path("last.pt"))
    assert resumed.is_last and resumed.precision.scaler.get_scale() == 8.0
    assert resumed.means.read() == trained.means.read() != {}
    torch.testing.assert_close(resumed.state_dict(), trained.state_dict(), rtol=0, atol=0)
    for spoilt in ({}, {**trained.state_dict(), "model": {"weight": torch.zeros(2)}}):
        with pytest.raises(InputError, match=r"checkpoint last\.pt does not fit this run"):
            resumed.load_state_dict(spoilt, Path("last.pt"))


def test_micro_batches_draw_the_same_side_by_side_and_one_after_the_other():
    def draws(process: Process, micro_batch: int, iteration: int = 5) -> float:
        Trainer._seed(SimpleNamespace(seed=3, process=process, iteration=iteration), micro_batch)
        return torch.rand(()).item()

    one_after_the_other = [draws(ALONE, micro_batch) for micro_batch in range(4)]
    side_by_side = [draws(Process(rank, 2, CPU), micro_batch) for micro_batch in range(2) for rank in range(2)]
    assert one_after_the_other == side_by_side and len({*side_by_side, draws(ALONE, 0, iteration=6)}) == 5


def test_running_means_are_means_since_the_last_read():
    means = RunningMeans(ALONE)
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "half": torch.tensor(value / 2)})
    copied = RunningMeans(ALONE)
    copied.load_state_dict(means.state_dict())
    assert means.read() == copied.read() == {"loss": 3.0, "half": 1.5}
    assert means.read() == {}
    copied.load_state_dict({"names": ["loss"], "sums_by_rank": [[4.0], [8.0]], "count": 2})  # of two processes
    assert copied.read() == {"loss": 3.0}


def test_the_peak_of_memory_is_in_bytes():
    """In a process of its own: what tests before this one have freed may be used again."""
    code = """
from engine.hooks.reporting import peak_resident
before = peak_resident()
more = bytearray(b"\\1") * 2**28
print(peak_resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**27 < int(done.stdout) < 2**29


@pytest.mark.slow
def test_a_process_does_not_count_what_its_parent_needed():
    parent = f"""
import subprocess, sys
large = bytes([1]) * {2**31}
child = "import torch; from engine.hooks.reporting import peak_memory; print(peak_memory(torch.device('cpu')))"
subprocess.run([sys.executable, "-c", child], check=True, close_fds=False)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 0 < float(done.stdout) < 1.5 * 1024
