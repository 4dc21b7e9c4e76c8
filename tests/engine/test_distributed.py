"""Several processes, as far as one can tell: where they meet, what they agree on, how a model is prepared for them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import timm
import torch
from torch import nn
from torch.distributed import DistNetworkError, TCPStore

import engine.distributed
from engine.distributed import ADDRESS, Agreement, Process, fresh_store, synchronise_batchnorm
from engine.errors import InputError
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
