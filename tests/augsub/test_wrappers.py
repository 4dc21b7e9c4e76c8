"""What stands between a patched model and its objective: copies, shards, and engines of others."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import augsub


@pytest.fixture
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def masksub() -> augsub.SubModelObjective:
    return augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("masking", ratio=0.5)])


@pytest.mark.parametrize("name", ["masking", "drop_path"])
def test_copies_of_data_parallel_have_no_sub_model(name, make_model, images, labels):
    model = augsub.patch(make_model("vit"))
    replica = model._replicate_for_data_parallel()  # as DataParallel makes one for each GPU
    with pytest.raises(ValueError, match=r"^DataParallel computes in copies .* use DistributedDataParallel$"):
        replica(images, augsub=name, augsub_ratio=0.5)
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        masksub().prepare(nn.DataParallel(model))
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        masksub()(nn.DataParallel(model), images, labels)


def test_a_model_inside_of_fsdp_is_patched_before(process_group, make_model):
    wrapped = FullyShardedDataParallel(make_model("vit"), device_id=torch.device("cpu"))
    for use in (augsub.patch, augsub.supports):
        with pytest.raises(ValueError, match="FullyShardedDataParallel is a wrapper: patch the model itself, before"):
            use(wrapped)


@pytest.mark.parametrize("is_reduced", [False, True])
def test_fsdp2_reduces_in_the_callers_backward_or_not(process_group, make_model, images, labels, is_reduced):
    model = augsub.patch(make_model("vit"))
    objective = masksub()
    objective.prepare(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model.set_requires_gradient_sync(is_reduced)
    objective(model, images, labels).loss.backward()
    assert all((parameter.grad is not None) == is_reduced for parameter in model.parameters())


def test_torch_fx_is_told_to_take_a_plain_copy(make_model):
    model = augsub.patch(make_model("resnet"))
    with pytest.raises(TypeError, match=r"torch\.fx traces plain models: give it augsub\.unpatch\(copy\.deepcopy"):
        torch.fx.symbolic_trace(model)
    torch.fx.symbolic_trace(augsub.unpatch(copy.deepcopy(model)))


def test_a_model_goes_into_peft_patched(make_model, images, labels):
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(make_model("vit"), config)
    for outer in (wrapped, wrapped.base_model):
        with pytest.raises(ValueError, match="is a wrapper: patch the model itself, before wrapping it"):
            augsub.patch(outer)
    model = peft.get_peft_model(augsub.patch(make_model("vit")), config)
    objective = masksub()
    out = objective.backward(objective.prepare(model), images, labels)
    assert torch.isfinite(out.loss)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
