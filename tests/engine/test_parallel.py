"""How a model is prepared for several processes, as far as one process can tell."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from engine.distributed import Agreement, Process, synchronise_batchnorm
from engine.errors import InputError
from models.blocks import checkpoint_gradients, innermost_blocks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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


BLOCKS = {
    "vit_tiny_patch16_224": {"Block": 12},
    "swin_tiny_patch4_window7_224": {"SwinTransformerBlock": 12},
    "resnet50": {"Bottleneck": 16},
    "convnext_atto": {"ConvNeXtBlock": 12},
    "cait_xxs24_224": {"LayerScaleBlock": 24, "LayerScaleBlockClassAttn": 2},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    with torch.device("meta"):
        blocks = innermost_blocks(timm.create_model(name))
    assert Counter(type(block).__name__ for block in blocks) == BLOCKS[name]


def test_a_model_that_cannot_checkpoint_gradients_is_refused():
    with pytest.raises(ValueError, match="cannot checkpoint gradients"):
        checkpoint_gradients(timm.create_model("dla34"))


def test_in_a_single_process_the_answer_is_immediate():
    agreement = Agreement(Process(0, 1, CPU))
    assert [agreement.ask(wanted) for wanted in (False, True, False)] == [False, True, False]
