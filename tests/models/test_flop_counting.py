"""One FLOP is one multiply-add: every handler of ours against arithmetic by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import augsub
from models.flop_counting import count_forward


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def cost(module, *shape):
    return count_forward(module.eval(), torch.zeros(shape))


def test_attention():
    values = torch.zeros(2, 3, 7, 6)  # (B, heads, S, F)

    def attend(query):
        return functional.scaled_dot_product_attention(query, torch.zeros(2, 3, 7, 4), values)

    counted = cost(Function(attend), 2, 3, 5, 4)
    assert counted.flops == 2 * 3 * (5 * 7 * 4 + 5 * 7 * 6)
    assert counted.activations == 2 * 3 * 5 * 6


def test_convolution_with_same_padding():
    counted = cost(nn.Conv2d(6, 6, 3, groups=6, padding="same"), 2, 6, 8, 8)
    assert counted.flops == 2 * 6 * 9 * 8 * 8
    assert counted.activations == 2 * 6 * 8 * 8


def test_lstm_of_two_layers_and_directions():
    lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
    counted = cost(lstm, 2, 5, 4)
    first, second = 4 * 3 * (4 + 3), 4 * 3 * (2 * 3 + 3)  # four gates; the second layer sees both directions
    assert counted.flops == 2 * 5 * 2 * (first + second)
    assert counted.activations == 2 * 5 * 6


def test_unfold_fold_and_bicubic_resize():
    unfolded = cost(nn.Unfold(2, stride=2), 1, 3, 8, 8)
    assert unfolded.flops == 0 and unfolded.uncounted == {}
    assert cost(nn.Fold(8, 2, stride=2), 1, 12, 16).flops == 12 * 16
    resized = Function(lambda x: functional.interpolate(x, (6, 6), mode="bicubic"))
    assert cost(resized, 1, 2, 4, 4).flops == 2 * 36 * 16


def test_what_is_not_counted_is_named():
    counted = cost(nn.Sequential(nn.Linear(4, 4), Function(lambda x: torch.cumprod(x * x, 1))), 2, 4)
    assert counted.flops == 2 * 4 * 4
    assert counted.uncounted == {"mul": 1, "cumprod": 1}


def test_modules_of_main_model_and_sub_model_have_the_same_names(make_model):
    model = augsub.patch(make_model("vit")).eval()
    images = torch.zeros(1, 3, 32, 32)
    main, sub = count_forward(model, images), count_forward(model, images, augsub.build("masking", ratio=0.5))
    assert main.flops_by_module.keys() == sub.flops_by_module.keys()
    assert main.flops_by_module[""] == main.flops
    assert main.flops_by_module["patch_embed"] == sub.flops_by_module["patch_embed"]
    # linear layers of a block: 4 D^2 in attention, 8 D^2 in the MLP; class token and 16 or 8 patches
    assert main.flops_by_module["blocks.0.mlp"] == 17 * 8 * 48**2
    assert sub.flops_by_module["blocks.0.mlp"] == 9 * 8 * 48**2
