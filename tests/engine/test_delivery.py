"""From bytes to what a model takes, against torchvision's transforms."""

from __future__ import annotations

import random

import pytest
import torch
from torchvision.transforms import Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from engine.config import Config
from engine.data.transforms import Normalise, build_delivery

CPU = torch.device("cpu")
LABELS = torch.arange(16)


def every_byte() -> torch.Tensor:
    """(16, 3, 16, 16): each value in each channel."""
    return torch.arange(256, dtype=torch.uint8).view(16, 16).expand(16, 3, 16, 16).contiguous()


def delivered(**transform) -> torch.Tensor:
    config = Config()
    vars(config.transform).update(transform)
    images, labels = build_delivery(config, CPU, is_training=True)(every_byte(), LABELS)
    assert torch.equal(labels, LABELS)
    return images


def test_bytes_become_what_torchvision_makes_of_them_to_the_bit():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image = every_byte()[0]
    expected = Normalize(mean, std)(ToTensor()(to_pil_image(image)))
    assert torch.equal(Normalise(mean, std)(image), expected)
    assert torch.equal(delivered(mean=mean, std=std), expected.expand(16, 3, 16, 16))


def test_floats_are_ready_already():
    config = Config()
    config.data.dataset = "digits"
    config.transform.random_erase = 1.0
    images = torch.randn(16, 1, 8, 8)
    assert torch.equal(build_delivery(config, CPU, is_training=True)(images.clone(), LABELS)[0], images)


def test_rectangles_are_erased_from_normalised_training_images_alone():
    random.seed(0)
    plain = delivered()
    erased = delivered(random_erase=1.0, erase_mode="const", erase_area=[0.25, 0.25], erase_aspect=[1, 1.0001])
    changed = (erased != plain).any(dim=1)
    assert (erased[:, 0][changed] == 0).all()  # the mean colour
    assert changed.flatten(1).sum(dim=1).tolist() == [64] * 16  # a quarter of 16 x 16 pixels
    assert len(changed.flatten(1).unique(dim=0)) > 1
    config = Config()
    config.transform.random_erase = 1.0
    assert torch.equal(build_delivery(config, CPU, is_training=False)(every_byte(), LABELS)[0], plain)


def test_erasing_follows_the_seed():
    def erased(seed: int) -> torch.Tensor:
        random.seed(seed), torch.manual_seed(seed)
        return delivered(random_erase=0.5)

    assert torch.equal(erased(1), erased(1))
    assert not torch.equal(erased(1), erased(2))
    untouched = (erased(1) == delivered()).flatten(1).all(dim=1)
    assert 0 < untouched.sum() < 16


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_one_image_or_many(shape):
    images = torch.full(shape, 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.5) / 0.25, (1 - 0.25) / 0.5, 1.0])[:, None, None].expand(shape)
    assert torch.equal(Normalise([0.5, 0.25, 0.0], [0.25, 0.5, 1.0])(images), expected)


def test_channels_last_is_how_images_lie_in_memory():
    config = Config()
    config.train.channels_last = True
    images, _ = build_delivery(config, CPU, is_training=True)(every_byte(), LABELS)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, delivered())
