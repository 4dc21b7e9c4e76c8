"""Groups of windows of Swin: what is left out is not computed, and the rest is computed as it would be alone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import augsub
from models.complexity import analyze

SIDE = 16  # pixels of a group: the second of three stages has windows of 4 x 4 positions of 4 pixels
SMALL = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
VARIANTS = {  # without pretrained_window_sizes the biases of V2 would depend on the size of the window
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {"pretrained_window_sizes": (4, 4, 4)},
}


def swin(name: str = "swin_tiny_patch4_window7_224", image_size: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=image_size, **SMALL, **VARIANTS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def of_group_size(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The same weights in a model that timm builds for images of the size of a group, with windows that fit."""
    small = swin(name, image_size=SIDE)
    state = model.state_dict()
    for key, own in small.state_dict().items():
        if own.shape != state[key].shape:  # a table of position biases, (offsets, heads), for a smaller window
            (built, side), heads = (round(len(table) ** 0.5) for table in (state[key], own)), own.shape[1]
            border = (built - side) // 2
            inner = state[key].view(built, built, heads)[border : built - border, border : built - border]
            state[key] = inner.reshape(own.shape)
    small.load_state_dict({key: state[key] for key in small.state_dict()})
    return small


def drop_windows(ratio: float = 0.5) -> augsub.SubModelAugmentation:
    return augsub.build("masking", ratio=ratio, mode="drop_windows")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 8), (0.9, 1)])
def test_every_group_is_computed_as_an_image_of_its_own(name, ratio, kept):
    images, plain = torch.randn(3, 3, 64, 64), swin(name)
    model = augsub.patch(swin(name))
    torch.manual_seed(7)
    logits = model(images, augsub=drop_windows(ratio))

    torch.manual_seed(7)
    chosen = torch.rand(3, 16).topk(kept, largest=False).indices
    small = of_group_size(model, name)
    cells = images.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).flatten(2, 3).transpose(1, 2)  # (B, 16, 3, 16, 16)
    features = [
        small.forward_features(sample[cell]).mean(dim=(0, 1, 2)) for sample, cell in zip(cells, chosen, strict=True)
    ]
    torch.testing.assert_close(logits, small.head.fc(torch.stack(features)), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(images, augsub=drop_windows(0.0)), plain(images))
    assert torch.equal(model(images), plain(images))


def test_the_published_swin_saves_what_it_leaves_out():
    cost = analyze(timm.create_model("swin_tiny_patch4_window7_224"), (3, 224, 224), [drop_windows()])
    assert cost.sub_flops < 0.53 * cost.main.flops


def test_gradients_are_the_same_with_gradient_checkpointing_and_in_a_copy():
    images = torch.randn(2, 3, 64, 64)
    model = augsub.patch(swin())

    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(images, augsub=drop_windows()).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(model)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    for one, other in zip(expected, gradients(twin), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            [{"name": "random_crop", "ratio": 0.6}, drop_windows()],
            "20 x 20 positions does not divide into several groups",
        ),
        (drop_windows(0.95), r"ratio = 0\.95 leaves none of 16 cells"),
        ({"name": "masking", "mode": "drop_windows", "cell": 8}, "masking: cell = 8 px"),
    ],
)
def test_what_does_not_fit_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        augsub.patch(swin())(torch.randn(1, 3, 64, 64), augsub=spec)
