"""Photographs at a reduced scale, turned as their camera says, or too large: against the whole image."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resized_crop

from engine.config import DataConfig
from engine.data.images import Needed, decode
from engine.data.source import build_source
from engine.data.transforms import build_transform, largest_divisor
from engine.errors import InputError

ORIENTATION = 0x0112  # EXIF's
SIZE = (1200, 800)


@pytest.fixture
def photograph(tmp_path) -> Path:
    """A large JPEG: colours that change slowly, with a bright corner."""
    x, y = np.meshgrid(np.linspace(0, 6, SIZE[0]), np.linspace(0, 4, SIZE[1]))
    pixels = np.stack([np.sin(x) * 90 + 120, np.cos(x + y) * 90 + 120, np.sin(y * 2) * 90 + 120], axis=-1)
    pixels[:200, :300] = 250
    path = tmp_path / "photograph.jpg"
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    return path


def test_divisors_leave_no_side_too_short():
    assert [largest_divisor((side, 2000), (224, 224)) for side in (100, 447, 448, 895, 896, 1792)] == [1, 1, 2, 2, 4, 8]


@pytest.mark.parametrize("scale", [[0.9, 1.0], [0.08, 0.2]])
def test_a_reduced_crop_shows_what_the_whole_one_does(photograph, folder_config, tmp_path, scale):
    config = folder_config(tmp_path, image_size=48, draft_decoding=True)
    config.transform.scale, config.transform.auto_augment, config.transform.hflip = scale, None, 0.0
    transform = build_transform(config, is_training=True)
    crop = transform.transforms[0]
    whole = decode(photograph.open("rb"))
    for seed in range(5):
        random.seed(seed)
        torch.manual_seed(seed)
        reduced = decode(photograph.open("rb"), needed=crop.needed)
        box, divisor = reduced.info[Needed.BOX], round(SIZE[0] / reduced.width)
        assert divisor > 1 and (box[2] - box[0]) * reduced.width >= 47 and (box[3] - box[1]) * reduced.height >= 47
        found = transform(reduced).float()
        left, top, right, bottom = (round(share * side) for share, side in zip(box, SIZE * 2, strict=True))
        expected = resized_crop(whole, top, left, bottom - top, right - left, [48, 48], Image.Resampling.BICUBIC)
        difference = (found - torch.from_numpy(np.array(expected)).permute(2, 0, 1)).abs()
        assert difference.mean() < 2 and difference.quantile(0.98) < 12, (seed, difference.mean())


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_of_a_reduced_image_shows_what_the_whole_one_does(photograph, folder_config, tmp_path, mode):
    config, transforms = folder_config(tmp_path, image_size=96), []
    config.transform.eval_crop_mode = mode
    for config.data.draft_decoding in (False, True):
        transforms.append(build_transform(config, is_training=False))
    whole, reduced = transforms
    image = decode(photograph.open("rb"), needed=reduced.transforms[0].needed)
    assert image.width == SIZE[0] // 4
    difference = (reduced(image).float() - whole(decode(photograph.open("rb"))).float()).abs()
    assert difference.mean() < 2


def test_what_is_no_jpeg_is_decoded_whole_and_cropped_alike(photograph, tmp_path, folder_config):
    path = tmp_path / "same.png"
    Image.open(photograph).save(path)
    transform = build_transform(folder_config(tmp_path, image_size=48, draft_decoding=True), is_training=True)
    image = decode(path.open("rb"), needed=transform.transforms[0].needed)
    assert image.size == SIZE and transform(image).shape == (3, 48, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("is_reduced", [False, True])
def test_photographs_are_turned_as_their_camera_says(photograph, tmp_path, orientation, is_reduced):
    """Stored so that its viewer sees the photograph upright."""
    upright = Image.open(photograph)
    stored = (
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    )
    name = stored[orientation - 1]
    image = upright if name is None else upright.transpose(Image.Transpose[name])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    needed = (lambda size: Needed(2 if size == SIZE else 1)) if is_reduced else None
    found = decode((tmp_path / "turned.jpg").open("rb"), DataConfig(exif_orientation=True), needed)
    expected = upright.resize(found.size)
    assert found.size == (tuple(side // 2 for side in SIZE) if is_reduced else SIZE)
    assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 3
    assert decode((tmp_path / "turned.jpg").open("rb")).size == image.size  # else as it is stored


def test_sixteen_bits_are_turned_and_a_tiff_is_not_turned_twice(tmp_path, folder_config):
    """Pillow turns a TIFF itself."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = np.arange(20 * 60, dtype=np.uint16).reshape(60, 20) * 50
    Image.fromarray(pixels).save(tmp_path / "deep.png", exif=exif)
    found = decode((tmp_path / "deep.png").open("rb"), DataConfig(exif_orientation=True))
    assert np.array_equal(np.asarray(found)[..., 0], np.rot90(np.rint(pixels / 257).astype(np.uint8), -1))
    Image.new("RGB", (20, 60)).save(tmp_path / "turned.tif", exif=exif)
    sizes = []
    needed = lambda size: (sizes.append(size), Needed())[1]  # noqa: E731
    for turns in (False, True):
        image = decode((tmp_path / "turned.tif").open("rb"), DataConfig(exif_orientation=turns), needed)
        assert image.size == (60, 20) == sizes.pop()


def test_an_image_of_too_many_pixels_is_a_bad_file(image_folder, folder_config):
    source = build_source(folder_config(image_folder, max_megapixels=0.004))
    with pytest.raises(Exception, match=r"60 pixels are 0.0 million, more than data.max_megapixels = 0.004 allows"):
        source.train[0]


def test_a_cache_holds_whole_images_alone(image_folder, folder_config):
    from engine.config_check import check

    with pytest.raises(InputError, match=r"data.draft_decoding: not with data.cache"):
        check(folder_config(image_folder, draft_decoding=True, cache="ram"))


def test_of_small_images_nothing_is_left_out(image_folder, folder_config):
    plain, reduced = (
        build_source(folder_config(image_folder, draft_decoding=way, image_size=56)) for way in (False, True)
    )
    assert all(torch.equal(plain.held_out[number][0], reduced.held_out[number][0]) for number in range(4))
