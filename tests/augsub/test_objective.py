from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import augsub

HALF = augsub.SubModel("masking", ratio=0.5, weight=0.5)
SUBS = {
    "none": [],
    "one": [HALF],
    "two": [augsub.SubModel("masking", ratio=0.25, weight=0.2), augsub.SubModel("drop_path", ratio=0.3, weight=0.7)],
    "composed": [augsub.SubModel([{"name": "random_crop", "ratio": 0.5}, {"name": "drop_path", "ratio": 0.2}])],
}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **tolerance)


@pytest.mark.parametrize("subs", SUBS)
@pytest.mark.parametrize("amp", [False, True])
def test_backward_branch_by_branch_equals_one_graph(subs, amp, make_model, images, labels):
    model = augsub.patch(make_model("vit_drop")).train()
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), SUBS[subs], main_weight=0.4)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        joint = objective(model, images, labels)
    joint.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        output = objective.backward(model, images, labels)
    assert_same(gradients(model), expected, rtol=1e-2 if amp else 1e-5, atol=1e-3 if amp else 1e-7)
    torch.testing.assert_close(output.loss, joint.loss.detach())
    torch.testing.assert_close(output.sub_losses, [loss.detach() for loss in joint.sub_losses])
    torch.testing.assert_close(output.logits, joint.logits)
    assert not output.loss.requires_grad and not output.logits.requires_grad


def test_loss_values_are_the_papers(make_model, images, labels):
    model = augsub.patch(make_model("vit")).train()
    torch.manual_seed(3)
    output = augsub.SubModelObjective(nn.CrossEntropyLoss(), [HALF])(model, images, labels)
    torch.manual_seed(3)
    main, sub = model(images), model(images, augsub="masking", augsub_ratio=0.5)
    main_loss = F.nll_loss(main.log_softmax(1), labels)
    sub_loss = -(main.softmax(1) * sub.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(output.main_loss, main_loss)
    torch.testing.assert_close(output.sub_losses[0], sub_loss)
    torch.testing.assert_close(output.loss, (main_loss + sub_loss) / 2)


def test_the_teaching_prediction_gets_no_gradient(make_model, images, labels):
    model = augsub.patch(make_model("vit")).train()
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [HALF], main_weight=0.0)
    torch.manual_seed(3)
    objective.backward(model, images, labels)
    actual = gradients(model)
    model.zero_grad()
    torch.manual_seed(3)
    with torch.no_grad():
        teaching = model(images).softmax(1)
    (0.5 * F.cross_entropy(model(images, augsub="masking"), teaching)).backward()
    assert_same(actual, gradients(model), rtol=1e-4, atol=1e-7)


def test_without_sub_models_it_is_plain_training(make_model, images, labels):
    model = augsub.patch(make_model("vit")).train()
    output = augsub.SubModelObjective(nn.CrossEntropyLoss(), main_weight=0.5)(model, images, labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(model(images), labels))
    assert output.sub_losses == []


def test_only_one_graph_is_alive_at_a_time(make_model, images, labels):
    """The main forward's activations are freed before the sub-forward begins."""
    saved, alive_at_start = weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    model = augsub.patch(make_model("vit")).train()
    model.patch_embed.register_forward_pre_hook(lambda *_: alive_at_start.append(len(saved)))
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [HALF])
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda holder: holder.tensor):
        objective.backward(model, images, labels)
        output = objective(model, images, labels)
    assert alive_at_start[:2] == [0, 0]
    assert alive_at_start[3] > 20  # one graph for both: what the first way avoids
    del output


def test_prepare_freezes_a_mask_token_that_nothing_trains(make_model):
    model = augsub.patch(make_model("swin"))
    for name in ("drop_path", "masking"):
        augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(name, ratio=0.1)]).prepare(model)
        assert model.mask_token.requires_grad == (name == "masking")


DISTRIBUTED = """
import itertools, torch, torch.distributed as dist, augsub
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from tests.conftest import MODELS

@augsub.register("checkerboard")
class Checkerboard(augsub.SubModelAugmentation):
    sites = ("tokens", "stem")
    def tokens(self, tokens):
        return tokens.keep(torch.arange(0, tokens.num_patches, 2).expand(tokens.values.shape[0], -1))
    def stem(self, features):
        features.values = torch.cat([features.values[:, :4], features.mask_token.expand_as(features.values[:, 4:])], 1)
        return features

dist.init_process_group("gloo")
rank, reductions = dist.get_rank(), []
def counting(state, bucket):
    reductions.append(bucket.buffer().numel())
    return allreduce_hook(state, bucket)

for name, count, accumulation in itertools.product(("vit", "swin"), (0, 1, 2), (1, 2)):
    torch.manual_seed(0)
    model, single = (augsub.patch(MODELS[name]()) for _ in range(2))
    single.load_state_dict(model.state_dict())
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), count * [augsub.SubModel("checkerboard", ratio=0.5)])
    objective.prepare(model), objective.prepare(single)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, counting)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    for step in range(3):  # DDP finds a missing reduction in the step after it
        wrapped.zero_grad(), reductions.clear()
        for part in range(accumulation):
            mine = slice(part * 2 + rank, None, 2 * accumulation)
            objective.backward(wrapped, images[mine], labels[mine], sync=part == accumulation - 1,
                               backward=lambda loss: (loss / accumulation).backward())
        assert sum(reductions) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    objective.backward(single, images, labels)
    for (key, p), q in zip(model.named_parameters(), single.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=key)
dist.destroy_process_group()
print("rank", rank, "equal")
"""


def test_two_processes_equal_one_with_the_double_batch_and_reduce_once(tmp_path):
    """Without find_unused_parameters, with and without sub-models and accumulation."""
    (tmp_path / "distributed.py").write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, tmp_path / "distributed.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal") == 2
