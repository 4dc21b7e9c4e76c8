"""Several processes: where they meet, what they know of each other, how a model is prepared for them."""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import DistNetworkError, TCPStore

import engine.distributed
from engine.distributed import ADDRESS, Agreement, Process, fresh_store, synchronise_batchnorm
from engine.errors import InputError, NonFiniteLossError
from engine.hooks.training import NaNGuard, SameBatchNormStatistics
from engine.precision import Precision
from engine.trainer import RunningMeans
from models.build import checkpoint_gradients, innermost_blocks

HOST = "127.0.0.1"
MINUTE = timedelta(minutes=1)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def agent(monkeypatch):
    """A store that has outlived the process whose address it keeps."""
    monkeypatch.setattr(engine.distributed, "PATIENCE", timedelta(milliseconds=200))
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    dead = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    store.set(ADDRESS, str(dead.port))
    return store


def test_a_dead_process_is_not_met(agent):
    with ThreadPoolExecutor() as pool:
        client = TCPStore(HOST, agent.port, is_master=False)
        waiting = pool.submit(fresh_store, client, HOST, 1, MINUTE)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)  # the stale address refuses, or nobody would have to wait
        main = fresh_store(agent, HOST, 0, MINUTE)
        other = waiting.result(timeout=60)
    main.set("key", "value")
    assert other.get("key") == b"value" and other.timeout == MINUTE


def test_without_a_main_process_it_ends(agent):
    with pytest.raises(DistNetworkError):
        fresh_store(agent, HOST, 1, timedelta(milliseconds=300))


def one_of_two(rank: int, store: Path, answers: multiprocessing.Queue) -> None:
    """What a process learns of the other one, each thing by itself."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    process = Process(rank, 2, CPU, dist.new_group(backend="gloo"))
    found = {
        "sum": process.sum(torch.tensor(1 + rank)).item(),
        "min": process.min(torch.tensor(5 - rank)).item(),
        "gather": process.gather({"rank": rank}),
        "broadcast": process.broadcast(f"of {rank}"),
        "agree": (process.agree(True, "both"), process.agree(False, "none")),
    }
    with pytest.raises(InputError, match="one for 1 of 2 processes only"):
        process.agree(rank == 1, "one")
    agreement = Agreement(process)
    found["asked"] = [agreement.ask(wanted) for wanted in (False, rank == 1, False, False)]
    agreement.finish()

    means, resumed = RunningMeans(process), RunningMeans(process)
    for value in (1.0, 2.0):
        means.add({"loss": torch.tensor(value + 10 * rank)})
    resumed.load_state_dict(means.state_dict())
    found["means"] = (resumed.state_dict()["sums_by_rank"], means.read())

    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(7.0 + rank)
    SameBatchNormStatistics(layer).before_step()
    found["statistics"] = layer.running_mean.tolist()

    guard = NaNGuard(period=1)
    guard.trainer = SimpleNamespace(process=process, precision=Precision("off", CPU), iteration=3)
    guard.before_train()
    guard.trainer.last_loss = torch.tensor(math.nan if rank == 1 else 1.0)
    with pytest.raises(NonFiniteLossError, match="not finite at iteration 3"):
        guard.after_step()
    answers.put((rank, found))
    dist.destroy_process_group()


def test_two_processes_know_the_same(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=one_of_two, args=(rank, tmp_path / "store", answers), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert found[0] == {
        "sum": 3,
        "min": 4,
        "gather": [{"rank": 0}, {"rank": 1}],
        "broadcast": "of 0",
        "agree": (True, False),
        "asked": [False, False, True, False],  # a step later
        "means": ([[3.0], [23.0]], {"loss": 6.5}),
        "statistics": [7.0, 7.0],
    }


def test_in_a_single_process_the_answer_is_immediate():
    agreement = Agreement(Process(0, 1, CPU))
    assert [agreement.ask(wanted) for wanted in (False, True, False)] == [False, True, False]


def test_batchnorm_is_synchronised_on_gpus(make_model, images):
    model = make_model("resnet").eval()
    expected, keys = model(images), list(model.state_dict())
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert synchronise_batchnorm(model, Process(0, 1, GPU)) is model
    converted = synchronise_batchnorm(model, Process(0, 2, GPU))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == layers > 5
    assert list(converted.state_dict()) == keys
    torch.testing.assert_close(converted.eval()(images), expected)
    with pytest.raises(InputError, match="on GPUs only"):
        synchronise_batchnorm(model, Process(0, 2, CPU))


def test_the_units_that_are_sharded():
    units = {
        "vit_tiny_patch16_224": {"Block": 12},
        "swin_tiny_patch4_window7_224": {"SwinTransformerBlock": 12},
        "resnet50": {"Bottleneck": 16},
        "convnext_atto": {"ConvNeXtBlock": 12},
        "cait_xxs24_224": {"LayerScaleBlock": 24, "LayerScaleBlockClassAttn": 2},
    }
    with torch.device("meta"):
        models = {name: timm.create_model(name) for name in units}
    found = {name: Counter(type(block).__name__ for block in innermost_blocks(model)) for name, model in models.items()}
    assert found == units


def test_a_model_that_cannot_checkpoint_gradients_is_refused():
    with torch.device("meta"):
        model = timm.create_model("dla34")
    with pytest.raises(ValueError, match="cannot checkpoint gradients"):
        checkpoint_gradients(model)
