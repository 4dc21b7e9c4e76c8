"""Corruptions against numpy, scipy, colorsys and Pillow."""

from __future__ import annotations

import colorsys
import csv
import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image
from torch import Tensor

from engine.config import Config
from engine.data.corruptions import CORRUPTIONS, Corruption, corrupted
from engine.errors import InputError
from tools import eval_net

FLOWER = torch.from_numpy(load_sample_image("flower.jpg")[:224, 200:424].copy()).permute(2, 0, 1)
FLOAT = FLOWER.double().numpy() / 255


def corrupt(name: str, severity: int, image: Tensor = FLOWER) -> np.ndarray:
    """Pixels in [0, 1]."""
    found = Corruption(name, severity, transform=lambda image: image)(image)
    assert found.dtype == torch.uint8 and found.shape == image.shape
    return found.double().numpy() / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_more_than_the_last_and_an_image_always_alike(name):
    distances = [np.abs(corrupt(name, severity) - FLOAT).mean() for severity in range(1, 6)]
    assert distances[0] > 0 and distances[4] == max(distances)
    assert distances == sorted(distances) or name == "pixelate"  # where 0.6 of a side is no whole number of pixels
    assert (corrupt(name, 5) == corrupt(name, 5)).all()


def test_noise_has_its_strength_and_differs_between_images():
    grey, other = torch.full((3, 64, 64), 128, dtype=torch.uint8), torch.full((3, 64, 64), 129, dtype=torch.uint8)
    noise = corrupt("gaussian_noise", 2, grey) - 128 / 255
    assert noise.std() == pytest.approx(0.12, rel=0.03) and abs(noise.mean()) < 0.01
    assert np.corrcoef(noise.ravel(), corrupt("gaussian_noise", 2, other).ravel())[0, 1] < 0.1
    shots = corrupt("shot_noise", 1, grey) - 128 / 255
    assert shots.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03)  # a Poisson's of 60 photons for white
    changed = corrupt("impulse_noise", 4, grey)
    assert (changed == 0).mean() == pytest.approx(0.085, abs=0.01) == (changed == 1).mean()


def test_colours_and_shapes_are_those_of_other_libraries():
    mean = FLOAT.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt("contrast", 3), (FLOAT - mean) * 0.2 + mean, atol=0.003)
    brighter = corrupt("brightness", 2)
    for row, column in ((0, 0), (100, 100), (17, 203), (223, 5)):
        hue, saturation, value = colorsys.rgb_to_hsv(*FLOAT[:, row, column])
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        np.testing.assert_allclose(brighter[:, row, column], expected, atol=0.003)
    blurred = np.stack([gaussian_filter(channel, 4, mode="mirror") for channel in FLOAT])
    np.testing.assert_allclose(corrupt("gaussian_blur", 4), blurred, atol=0.01)
    small = Image.fromarray(FLOWER.permute(1, 2, 0).numpy()).resize((56, 56), Image.Resampling.BOX)
    pixels = np.asarray(small.resize((224, 224), Image.Resampling.NEAREST)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(corrupt("pixelate", 5), pixels, atol=0.005)
    Image.fromarray(FLOWER.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "JPEG", quality=10)
    compressed = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(corrupt("jpeg_compression", 4), compressed, atol=1e-6)


@pytest.mark.parametrize("cache", [None, "ram"])
def test_the_images_of_a_configuration_under_all_of_them(image_folder, folder_config, cache):
    sources = corrupted(folder_config(image_folder, cache=cache))
    assert len(sources) == 40 and {len(source.held_out) for source in sources.values()} == {9}
    weak, strong = (sources[f"contrast/{severity}"].held_out[4] for severity in (1, 5))
    assert weak[1] == strong[1] == 1 and weak[0].float().std() > 4 * strong[0].float().std()
    config = Config()
    config.data.dataset, config.data.image_size = "digits", 8
    with pytest.raises(InputError, match="--variant corrupted: needs photographs, data"):
        corrupted(config)


@pytest.mark.slow
def test_an_evaluation_of_all_of_them(call, image_folder, tmp_path):
    own = ("--variant", "corrupted", "--output", tmp_path / "out", f"data.root={image_folder}", "data.workers=0")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "model.pt")
    code, printed, error = call(eval_net, tmp_path / "model.pt", "--model", "test_vit", *own)
    assert code == 0 and f"{image_folder} (validation), corrupted" in printed, error
    lines = list(csv.DictReader((tmp_path / "out" / "corruptions.csv").open()))
    assert [line["severity"] for line in lines[:6]] == [*"12345", "1"] and len(lines) == 40
    mean = np.mean([float(line["top1_err"]) for line in lines])
    assert f"{mean:.2f}" in printed and all(0 <= float(line["ece"]) <= 100 for line in lines)
    assert Image.open(tmp_path / "out" / "corruptions.png").size[0] > 1000
