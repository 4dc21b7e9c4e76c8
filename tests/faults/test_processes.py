"""Two processes, torch's own engines: the same mathematics as one, and checkpoints for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from engine.checkpoint import load
from engine.data.loaders import _begin_worker
from tests.faults.conftest import assert_same_end

ROOT = Path(__file__).parents[2]
DIGITS = {model: ROOT / "configs" / f"digits_{model}.yaml" for model in ("vit", "swin", "resnet")}
# SGD, whose update is as exact as the gradient; BatchNorm nets at larger rates double rounding errors at every step
TWENTY_STEPS = ("train.max_iters=20", "train.global_batch=40", "optimizer.name=sgd", "schedule.warmup_epochs=0")
RATES = {"vit": "optimizer.lr=0.05", "swin": "optimizer.lr=0.05", "resnet": "optimizer.lr=0.0001"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = load(folder / "checkpoints" / "last.pt")["model"]
    return {name: tensor for name, tensor in state.items() if "running_" not in name and "num_batches" not in name}


def assert_close(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.faults(
    fault="two processes instead of one",
    promise="the same weights to float tolerance after 20 steps with MaskSub, mixup, dropped paths, accumulation",
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", DIGITS)
def test_two_processes_are_one_with_twice_the_batch(finished, model, strategy):
    """2 x b against 1 x 2b, the latter in two micro-batches of b: the masks and mixtures are theirs."""
    run = ["--config", DIGITS[model], *TWENTY_STEPS, RATES[model], "mixup.mixup_alpha=0.8", "model.drop_path_rate=0.1"]
    turns = 1 if model == "resnet" else 2  # BatchNorm over ten 1 x 1 maps would make chaos of rounding errors
    one = finished(*run, f"train.accumulation={2 * turns}")
    assert_close(one, finished(*run, f"distributed.strategy={strategy}", f"train.accumulation={turns}", processes=2))
    start = weights(finished(*run, "train.max_iters=1", "optimizer.lr=1e-9"))
    moved = [(tensor - start[name]).abs().max() for name, tensor in weights(one).items()]
    assert max(moved) > 1e-3  # far beyond the tolerance


@pytest.mark.faults(
    fault="resumed with another number of processes, or another strategy",
    promise="the same stream of data goes on: the same weights to float tolerance",
)
def test_another_number_of_processes(server, finished, tmp_path):
    run = ["--config", DIGITS["vit"], *TWENTY_STEPS, RATES["vit"], "mixup.mixup_alpha=0.8", "checkpoint.period=5"]
    stations = [(1, 4, "ddp"), (2, 2, "fsdp2"), (4, 1, "fsdp2"), (2, 2, "ddp"), (1, 4, "fsdp2")]
    for station, (processes, accumulation, strategy) in enumerate(stations, start=1):
        arguments = [*run, f"train.accumulation={accumulation}", f"distributed.strategy={strategy}"]
        arguments += ["--resume", f"train.max_iters={4 * station}", f"output_dir={tmp_path}/moved"]
        out = server.succeed(*arguments, processes=processes)
        assert station == 1 or f"after {4 * station - 4} of {4 * station}" in out
    assert_close(finished(*run, "train.accumulation=4"), tmp_path / "moved")


@pytest.mark.faults(
    fault="SIGKILL with BatchNorm, of whose running statistics each process has its own, and averages of them",
    promise="the resumed run ends bit-identical to one that was never killed",
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_own_statistics(server, finished, tmp_path, strategy):
    run = ["--config", DIGITS["resnet"], "train.max_iters=24", "train.global_batch=100", "ema.enabled=true",
           "augsub.sub_models.0.learn_from=ema", "ema.decay=0.9", "evaluation.period=1", "checkpoint.period=4",
           "log.csv=true", "checkpoint.background=false",
           f"distributed.strategy={strategy}"]  # fmt: skip
    kill = {"function": "Trainer.run_step", "entry": 15, "delay": 0}  # between the evaluations at 10 and 20
    killed = [*run, f"output_dir={tmp_path}/killed"]
    assert -signal.SIGKILL in [end.code for end in server.run(*killed, processes=2, kill=kill)]
    said = server.succeed(*killed, "--resume", processes=2)
    assert "after 12 of 24" in said or "after 16 of 24" in said  # on a busy machine some entries are missed
    assert_same_end(finished(*run, processes=2), tmp_path / "killed")


@pytest.mark.faults(
    fault="gradient checkpointing, which computes the forwards again in backward",
    promise="the same weights to float tolerance, under one process, DDP and FSDP2",
)
@pytest.mark.parametrize("model", DIGITS)
def test_gradient_checkpointing(finished, model):
    run = ["--config", DIGITS[model], *TWENTY_STEPS, RATES[model]]
    again = [*run, "train.grad_checkpointing=true"]
    plain = finished(*run, "train.accumulation=2")
    assert_close(plain, finished(*again, "train.accumulation=2"))
    for strategy in ("ddp", "fsdp2"):
        assert_close(plain, finished(*again, f"distributed.strategy={strategy}", processes=2))


@pytest.mark.faults(
    fault="a parameter that only an earlier sub-model uses: Swin's mask token before a drop-path sub-model",
    promise="no find_unused_parameters, the same weights to float tolerance under DDP and FSDP2",
)
@pytest.mark.parametrize("order", [("masking", "drop_path"), ("drop_path", "masking")], ids=lambda order: order[0])
def test_two_sub_models(finished, order):
    augmentations = {"masking": "{name: masking, ratio: 0.5, cell: 2}", "drop_path": "{name: drop_path, ratio: 0.5}"}
    sub_models = ", ".join(f"{{weight: 0.25, augmentations: [{augmentations[name]}]}}" for name in order)
    run = ["--config", DIGITS["swin"], *TWENTY_STEPS, RATES["swin"], f"augsub.sub_models=[{sub_models}]"]
    one = finished(*run, "train.accumulation=2")
    for strategy in ("ddp", "fsdp2"):
        assert_close(one, finished(*run, f"distributed.strategy={strategy}", processes=2))


@pytest.mark.faults(
    fault="checkpoint.every_minutes, where every process has a clock of its own",
    promise="all processes save at the same step, by the main one's clock",
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_saving_by_the_clock(finished, strategy):
    run = ["--config", DIGITS["vit"], "train.max_iters=12", f"distributed.strategy={strategy}"]
    folder = finished(*run, "checkpoint.period=1000", "checkpoint.every_minutes=1e-6", processes=2)
    saved = {name: load(folder / "checkpoints" / f"{name}.pt")["iteration"] for name in ("last", "previous")}
    assert saved == {"last": 12, "previous": 11}  # asked for after each step, done after the next


OVERFLOW_IN_ONE_SHARD = """
import torch
import torch.distributed as dist
from torch import nn

from engine.distributed import Process
from engine.distributed import shard
from engine.precision import Precision
from tests.faults.conftest import assert_same_end

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
shard(model, [model[0]], Process(dist.get_rank(), 2, torch.device("cpu")), reshard_after_forward=True)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
precision = Precision("fp16", torch.device("cpu"), clip_norm=1.0)
precision.backward(model(torch.ones(2, 4)).sum())
if dist.get_rank() == 1:
    model[0].weight.grad.to_local()[0, 0] = float("inf")
before = [parameter.to_local().clone() for parameter in model.parameters()]
precision.step(optimizer)
after = [parameter.to_local() for parameter in model.parameters()]
assert precision.scaler.get_scale() == 32768
assert all(torch.equal(one, other) for one, other in zip(before, after))
dist.destroy_process_group()
"""


@pytest.mark.faults(
    fault="fp16: a gradient overflows in one process's shard only",
    promise="all processes leave the step out and halve the loss scale",
)
def test_an_overflow_in_one_shard(tmp_path):
    (tmp_path / "overflow.py").write_text(OVERFLOW_IN_ONE_SHARD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, tmp_path / "overflow.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _killed_while_forking(pids: str) -> None:
    """Forks workers that need a second to begin, and dies before they do."""
    begin = partial(_begin_worker, os.getpid())

    def slowly(worker: int) -> None:
        time.sleep(1)
        begin(worker)

    loader = DataLoader(range(100), num_workers=2, worker_init_fn=slowly)
    workers = iter(loader)._workers
    Path(pids).write_text(" ".join(str(worker.pid) for worker in workers))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.faults(
    fault="SIGKILL of a process while it forks its loader's workers",
    promise="they end too, so that their copies of its connections hide its death from nobody",
)
def test_workers_do_not_outlive_a_process_that_dies_while_it_forks_them(tmp_path):
    parent = multiprocessing.get_context("fork").Process(target=_killed_while_forking, args=(str(tmp_path / "pids"),))
    parent.start()
    parent.join()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
