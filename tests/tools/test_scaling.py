"""What a step sends and keeps: against sums by hand, and against what torch does in two processes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import augsub
from engine.distributed import Process, shard
from models.blocks import innermost_blocks
from tools.analysis import data_source
from tools.scaling import GPUS, configured, main, parse_arguments
from tools.step_costs.costs import (
    DDP_EACH,
    DDP_ONCE,
    FSDP_EACH,
    FSDP_KEPT,
    FSDP_ONCE,
    WAYS,
    Step,
    bucket_count,
    memory,
    traffic,
)  # fmt: skip
from tools.step_costs.measure import Measured, cases, expect, measure
from tools.step_costs.step import build_step
from tools.step_costs.tables import page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
SOME = [(1, 0), (1, 1), (2, 2)]  # micro-batches, sub-models


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    return measure(cases(SOME))


@pytest.fixture
def vit(make_model) -> nn.Module:
    model = augsub.patch(make_model("vit"))
    model.cls_token.requires_grad_(False)
    return model


def test_ddp_by_hand(vit):
    """48 wide, 3 blocks, patches of 8 on 32 px: all weights and biases one by one."""
    block = 2 * 2 * 48 + (48 * 144 + 144) + (48 * 48 + 48) + (48 * 192 + 192) + (192 * 48 + 48)
    gradient = 4 * (17 * 48 + 3 * 64 * 48 + 48 + 3 * block + 2 * 48 + 48 * 10 + 10)
    weights = gradient + 4 * 48  # the frozen class token
    step = Step(vit, processes=8, branches=3, accumulation=2, states=[torch.empty(gradient // 4)], averages=1)
    once, naive = traffic(DDP_ONCE, step), traffic(DDP_EACH, step)
    assert (once.reduced, naive.reduced) == (gradient, 6 * gradient)
    assert naive.all_reduces == 6 * once.all_reduces
    assert once.sent(8) == 2 * 7 * gradient // 8
    kept = memory(DDP_ONCE, step)
    assert (kept.parameters, kept.gradients, kept.states, kept.averages) == (weights, gradient, gradient, weights)
    assert kept.total == 2 * weights + 2 * gradient


def test_fsdp2_by_hand(vit):
    def shards(parameters, of=lambda p: True):
        return sum(4 * math.ceil(p.shape[0] / 8) * math.prod(p.shape[1:]) for p in parameters if of(p))

    step = Step(vit, processes=8, branches=2, accumulation=3)
    whole = 8 * shards(vit.parameters())
    gradient = 8 * shards(vit.parameters(), lambda p: p.requires_grad)
    assert gradient == whole - 8 * 4 * 48  # the class token (1, 1, 48) fills eight shards
    blocks, root = 8 * shards(vit.blocks[0].parameters()), whole - 8 * shards(vit.blocks.parameters())
    assert traffic(FSDP_ONCE, step).gathered == 6 * (2 * 3 * blocks + root)
    assert traffic(FSDP_ONCE, step).all_gathers == 6 * (2 * 3 + 1)
    assert traffic(FSDP_KEPT, step).gathered == 6 * whole
    reduced = [traffic(way, step).reduced for way in (FSDP_ONCE, FSDP_KEPT, FSDP_EACH)]
    assert reduced == [gradient, gradient, 6 * gradient]
    assert traffic(FSDP_ONCE, step).reduce_scatters == 4  # three blocks and the root
    assert traffic(FSDP_ONCE, step).sent(8) == 7 * (traffic(FSDP_ONCE, step).gathered + gradient) // 8
    trained = [p for p in vit.parameters() if p.requires_grad]
    assert memory(FSDP_ONCE, step).gradients == sum(p.nbytes for p in trained)
    assert memory(FSDP_KEPT, step).parameters == whole // 8 + whole
    assert memory(FSDP_ONCE, step).parameters == whole // 8 + root + 2 * blocks
    assert memory(FSDP_ONCE, replace(step, branches=1, accumulation=1)).gradients < memory(FSDP_ONCE, step).gradients


def test_fsdp2_keeps_gradients_whole_until_they_are_reduced(vit, images, labels, tmp_path):
    """Looks into torch: between the branches no shard has a gradient, and every whole parameter has."""
    gradient = sum(p.nbytes for p in vit.parameters() if p.requires_grad)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        shard(vit, innermost_blocks(vit), Process(0, 1, torch.device("cpu")), reshard_after_forward=True)
        objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("masking", 0.5)])
        objective.backward(vit, images, labels, sync=False)
        assert all(p.grad is None for p in vit.parameters())
        units = [m._get_fsdp_state()._fsdp_param_group for m in vit.modules() if hasattr(m, "_get_fsdp_state")]
        whole = [p._unsharded_param.grad for unit in units for p in unit.fsdp_params]
        assert sum(grad.nbytes for grad in whole if grad is not None) == gradient
        objective.backward(vit, images, labels)
        assert all(p.grad is not None for p in vit.parameters() if p.requires_grad)
        assert all(unit.reduce_grads for unit in units)
    finally:
        dist.destroy_process_group()


def check(measured: list[Measured]) -> None:
    """Computed to the byte, each bucket and unit once, and all ways find the same gradient."""
    norms: dict[tuple, float] = {}
    for item in measured:
        case = item.case
        assert item.seen == item.computed, case
        backwards = case.accumulation * (1 + case.sub_models)
        assert item.reductions == (1 if case.way.once else backwards), case
        if not case.way.sharded:
            assert len(item.buckets) > 1 and set(item.buckets) == {item.reductions}, case
        norm = norms.setdefault((case.model, case.accumulation, case.sub_models), item.gradient_norm)
        assert item.gradient_norm == pytest.approx(norm, rel=1e-5), case


def test_two_processes_reduce_each_gradient_once_as_computed(measured):
    assert {item.case.way for item in measured} == set(WAYS)
    check(measured)


def test_the_usual_loop_reduces_twice_with_one_sub_model(measured):
    naive = [item for item in measured if not item.case.way.once and item.case.sub_models == 1]
    assert [item.reductions for item in naive] == [2, 2]  # DDP and FSDP2


@pytest.mark.slow
def test_all_settings_in_two_processes():
    check(measure(cases()))


def test_the_page_is_up_to_date(monkeypatch):
    """With the computed numbers in place of the measured ones: the tests above find them equal."""
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    config = configured(parse_arguments())
    step = build_step(config, data_source(config), GPUS)
    assert page(step, [expect(case) for case in cases()]) == PAGE.read_text()
    assert sum(p.numel() for p in step.model.parameters()) == 631_953_640
    assert bucket_count(step.model) == 98


def test_another_model(monkeypatch, capsys):
    arguments = ["--model", "vit_tiny_patch16_224", "--processes", "4", "--json", "ema.enabled=true"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    assert main() == 0
    ways = json.loads(capsys.readouterr().out)
    weights = 4 * 5_717_416
    assert ways["DDP, reduced once"]["reduced"] == weights
    states = ways["DDP, reduced once"]["memory"]["states"]
    assert 0 <= states - 2 * weights < 1000  # two of AdamW, and its step counters
    assert ways["DDP, reduced once"]["memory"]["averages"] == weights


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--processes", "1"], "--processes = 1, allowed is 2 or more"),
        (["--processes", "48"], "train.global_batch = 2048: does not divide into 48 processes"),
        (["--model", "vit_tyny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--measure", "train.accumulation=2"], "--measure: trains models of its own"),
        (["--page", "page.md", "--json"], "--page: its text is about the default on its number of GPUs"),
    ],
    ids=["one", "indivisible", "unknown", "measured", "page"],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    assert main() == 2
    written = capsys.readouterr()
    last = written.err.splitlines()[-1]  # a missing data folder is noted first
    assert written.out == "" and last.startswith("error: ") and error in last
