"""What a step sends and keeps: against sums by hand, and against what torch does in two processes."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

import augsub
import tools.scaling
from engine.distributed import Process, replicate, shard
from engine.text import readable_size
from models.build import create_model, innermost_blocks
from tools.step_costs import STRATEGIES, Step, Strategy, memory, traffic

DDP_EACH, DDP_ONCE, FSDP_EACH, FSDP_ONCE, FSDP_KEPT, DDP_HALF, FSDP_HALF = STRATEGIES.values()


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
    step = Step(vit, processes=8, passes=6, states=[torch.empty(gradient // 4)], averages=1)
    once, naive = traffic(DDP_ONCE, step), traffic(DDP_EACH, step)
    assert (once["reduced"], naive["reduced"]) == (gradient, 6 * gradient)
    assert naive["all_reduces"] == 6 * once["all_reduces"] and once["sent"] == 2 * 7 * gradient // 8
    kept = memory(DDP_ONCE, step)
    assert kept == {"parameters": weights, "gradients": gradient, "states": gradient, "averages": weights}


def test_fsdp2_by_hand(vit):
    def shards(parameters):
        return sum(4 * math.ceil(p.shape[0] / 8) * math.prod(p.shape[1:]) for p in parameters)

    step = Step(vit, processes=8, passes=6)
    learned = [p for p in vit.parameters() if p.requires_grad]
    whole, gradient = 8 * shards(vit.parameters()), 8 * shards(learned)
    assert gradient == whole - 8 * 4 * 48  # the class token (1, 1, 48) fills eight shards
    blocks, root = 8 * shards(vit.blocks[0].parameters()), whole - 8 * shards(vit.blocks.parameters())
    once, kept, each = (traffic(way, step) for way in (FSDP_ONCE, FSDP_KEPT, FSDP_EACH))
    assert (once["gathered"], kept["gathered"]) == (6 * (2 * 3 * blocks + root), 6 * whole)
    assert (once["reduced"], kept["reduced"], each["reduced"]) == (gradient, gradient, 6 * gradient)
    assert (once["all_gathers"], once["reduce_scatters"]) == (6 * (2 * 3 + 1), 4)  # three blocks and the root
    assert once["sent"] == 7 * (once["gathered"] + gradient) // 8
    assert memory(FSDP_ONCE, step)["gradients"] == sum(p.nbytes for p in learned)
    assert memory(FSDP_KEPT, step)["parameters"] == whole // 8 + whole
    assert memory(FSDP_ONCE, step)["parameters"] == whole // 8 + root + 2 * blocks
    in_one_backward = shards(learned) + sum(p.nbytes for p in vit.blocks[0].parameters())
    assert memory(FSDP_ONCE, replace(step, passes=1))["gradients"] == in_one_backward


def test_fsdp2_keeps_gradients_whole_until_they_are_reduced(vit, images, labels, tmp_path):
    """Looks into torch: between the branches no shard has a gradient, and every whole parameter has."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        shard(vit, innermost_blocks(vit), Process(0, 1, torch.device("cpu")), reshard_after_forward=True)
        objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("masking", 0.5)])
        objective.backward(vit, images, labels, sync=False)
        units = [m._get_fsdp_state()._fsdp_param_group for m in vit.modules() if hasattr(m, "_get_fsdp_state")]
        whole = [p._unsharded_param.grad for unit in units for p in unit.fsdp_params]
        assert all(p.grad is None for p in vit.parameters())
        learned = sum(p.nbytes for p in vit.parameters() if p.requires_grad)
        assert sum(grad.nbytes for grad in whole if grad is not None) == learned
    finally:
        dist.destroy_process_group()


MODELS = {
    "ViT": {"name": "vit_tiny_patch16_224", "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3},
    "Swin": {
        "name": "swin_tiny_patch4_window7_224", "patch_size": 8, "window_size": 4, "embed_dim": 64, "depths": (2, 2),
        "num_heads": (2, 4),
    },
}  # fmt: skip
OPERATORS = {
    "c10d::allreduce_": ("all_reduces", "reduced"),
    "c10d::_reduce_scatter_base_": ("reduce_scatters", "reduced"),
    "c10d::_allgather_base_": ("all_gathers", "gathered"),
    "c10d::broadcast_": ("broadcasts", "broadcast"),
}  # torch's operator: what `traffic` calls its number and its bytes


class Collectives(TorchDispatchMode):
    """Counts the collectives that this thread issues; on a CPU it also runs backward and all of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            number, nbytes = OPERATORS[func._schema.name]
            self.counts[number] += 1
            tensors = [arg if isinstance(arg, list) else [arg] for arg in args if isinstance(arg, list | Tensor)]
            self.counts[nbytes] += max(sum(t.nbytes for t in part if isinstance(t, Tensor)) for part in tensors)
        return func(*args, **(kwargs or {}))


def backward(model, objective, strategy: Strategy, accumulation: int, rank: int) -> None:
    """The gradients of one step: as our trainer takes them, or as a loop does that knows nothing of reductions."""
    model.zero_grad()
    for micro_batch in range(accumulation):
        torch.manual_seed(2 * micro_batch + rank)
        images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
        if strategy.once:
            objective.backward(model, images, labels, sync=micro_batch == accumulation - 1)
        else:
            for branch in objective.branches(model, images, labels):
                (branch.weight * branch.loss).backward()


def count_in_a_process(rank: int, meeting: str, cases: list[tuple], results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    process, first = Process(rank, 2, torch.device("cpu")), {}
    for name, strategy, accumulation, sub_models in cases:
        torch.manual_seed(0)
        model = augsub.patch(create_model(**MODELS[name], num_classes=7, image_size=64))  # 7 is no multiple of 2
        masked = [augsub.SubModel("masking", ratio) for ratio in (0.5, 0.3)]
        objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), masked[:sub_models])
        objective.prepare(model)
        computed = traffic(strategy, Step(model, 2, accumulation * (1 + sub_models)))
        if strategy.sharded:
            wrapped = shard(model, innermost_blocks(model), process, strategy.reshard, strategy.reduce_dtype)
        else:
            wrapped = replicate(model, process, strategy.reduce_dtype)
            for _ in range(2):  # at its second step DDP makes its buckets anew
                backward(wrapped, objective, strategy, accumulation, rank)
        with Collectives() as seen:
            backward(wrapped, objective, strategy, accumulation, rank)
        whole = [
            getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in wrapped.parameters() if p.grad is not None
        ]
        gradient = torch.cat([grad.flatten() for grad in whole])
        expected = first.setdefault((name, accumulation, sub_models), gradient)
        if process.is_main:
            del computed["sent"]
            results.put((Counter(computed), seen.counts, float((gradient - expected).norm() / expected.norm())))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as engine.command_line.leave: threads of FSDP2 may abort the interpreter's own end


@pytest.mark.slow
def test_two_processes_send_what_is_computed(tmp_path):
    """To the byte, and all strategies find the same gradient.

    The main model of a Swin does not use its mask token: reduced after its own backward, DDP would wait for that
    gradient, and FSDP2 would leave it out.
    """
    cases = product(MODELS, STRATEGIES.values(), (1, 2), (0, 1, 2))  # the numbers: micro-batches, sub-models
    cases = [(name, strategy, *numbers) for name, strategy, *numbers in cases if strategy.once or name == "ViT"]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(count_in_a_process, (f"{tmp_path}/meet", cases, results), nprocs=2)
    for name, strategy, *setting in cases:
        computed, seen, difference = results.get()
        assert seen == computed, (name, strategy, setting)
        # of the gradient's norm: bf16 rounds to 8 bits before and after the sum of two
        assert difference < (2**-8 if strategy.reduce_dtype == "bf16" else 1e-5), (name, strategy, setting)


def test_another_model(call):
    arguments = ("--model", "vit_tiny_patch16_224", "--processes", "4", "ema.enabled=true")
    code, printed, _ = call(tools.scaling, *arguments)
    (once,) = re.findall(r"\| DDP, reduced once +\| (.+) \|", printed)
    _, sent, parameters, gradients, states, average, kept = (cell.strip() for cell in once.split("|"))
    weights = 4 * 5_717_416  # bytes; two of AdamW, beside which its step counters do not count
    assert code == 0 and sent == readable_size(2 * 3 * weights // 4) and states == readable_size(2 * weights)
    assert parameters == gradients == average == readable_size(weights) and kept == readable_size(5 * weights)


@pytest.mark.parametrize(
    ("processes", "error"),
    [
        (1, "--processes 1: allowed is 2 or more"),
        (48, "train.global_batch = 2048: does not divide into 48 processes"),
    ],
)
def test_bad_input_is_one_line(call, processes, error):
    code, printed, said = call(tools.scaling, "--processes", processes)
    last = said.splitlines()[-1]  # a missing data folder is noted first
    assert (code, printed) == (2, "") and last.startswith("error: ") and error in last
