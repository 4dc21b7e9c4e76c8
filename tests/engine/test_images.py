"""Image folders and the data sets of other packages."""

from __future__ import annotations

import dataclasses
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from engine.config import DataConfig, TransformConfig
from engine.data.datasets import build_held_out_images, build_images
from engine.data.stream import SeededDataset, TrainingOrder
from engine.data.transforms import build_train_transform
from engine.errors import InputError


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.jpg")
    return tmp_path


def test_an_image_folder_is_opened_with_its_classes(image_folder):
    source = build_images(DataConfig(root=str(image_folder), image_size=32), TransformConfig(auto_augment="rand-m9"))
    assert (len(source.train), len(source.held_out), source.num_classes, source.in_chans) == (6, 4, 2, 3)
    image, label = source.train[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label in (0, 1)
    assert torch.equal(source.held_out[0][0], source.held_out[0][0])


def test_random_transforms_follow_the_sample_key(image_folder):
    config = TransformConfig(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random")
    source = build_images(DataConfig(root=str(image_folder), image_size=32), config)
    dataset = SeededDataset(source.train)
    order = TrainingOrder(
        num_samples=6, repeats=1, micro_batch=3, accumulation=1, rank=0, world_size=1, seed=3, first_iteration=0,
        last_iteration=2,
    )  # fmt: skip
    keys = next(iter(order))
    first, again = dataset.__getitems__(keys), dataset.__getitems__(keys[::-1])[::-1]
    for (image, _), (same, _) in zip(first, again, strict=True):
        assert torch.equal(image, same)


def test_an_image_folder_with_faults_is_refused(image_folder, tmp_path):
    def refused(message: str, **changes):
        with pytest.raises(InputError) as error:
            build_images(DataConfig(**{"root": str(image_folder), **changes}), TransformConfig())
        assert message in str(error.value)

    refused("data.root is not set", root=None)
    refused("no such folder", root=str(tmp_path / "nowhere"))
    refused("no folder for the split holdout", eval_split="holdout")
    (image_folder / "train" / "fox").mkdir()
    refused("fox: the class folder holds no image")
    Image.new("RGB", (8, 8)).save(image_folder / "train" / "fox" / "0.png")
    refused("classes in one split only: fox")
    shutil.rmtree(image_folder / "train" / "fox")
    for split in ("train", "val"):
        shutil.move(image_folder / split / "dog", tmp_path / f"dogs_{split}")
    refused(f"data.root = {image_folder}: the only class is cat, at least two are needed")
    with pytest.raises(InputError, match="the only class is cat, at least two are needed"):
        build_held_out_images(DataConfig(root=str(image_folder)), TransformConfig())
    refused("data.dataset = hfds/nothing", dataset="hfds/nothing", root=None)
    refused("data.dataset = wds/cats: allowed is folder, digits, synthetic, or timm's torch/NAME", dataset="wds/cats")


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_below_the_class_folders_or_beside_them_are_refused(image_folder, split):
    """timm would take the folder around an image for its class: one class `images` of all, or one without a name."""
    config = DataConfig(root=str(image_folder), image_size=32)
    for stray in ("0.jpg", "cat/images/0.jpg"):
        path = image_folder / split / stray
        path.parent.mkdir(exist_ok=True)
        shutil.copy(image_folder / split / "dog" / "0.jpg", path)
        with pytest.raises(InputError, match=f"{stray}: an image must lie directly in a class folder of .*{split}"):
            build_images(config, TransformConfig())
        path.unlink()
    for folder in ("cat", "dog"):
        (image_folder / split / folder).rename(image_folder / split / "images")
        (image_folder / split / folder).mkdir()
        (image_folder / split / "images").rename(image_folder / split / folder / "images")
    with pytest.raises(InputError, match="cat: the class folder holds no image itself"):
        build_held_out_images(dataclasses.replace(config, eval_split=split), TransformConfig())


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "evaluation", "test"])
def test_the_held_out_images_are_those_of_their_folder(image_folder, name):
    (image_folder / "val").rename(image_folder / name)
    config = DataConfig(root=str(image_folder), image_size=32)
    for split in (config.eval_split, name):
        for build in (build_images, build_held_out_images):
            assert len(build(dataclasses.replace(config, eval_split=split), TransformConfig()).held_out) == 4


def test_a_held_out_folder_that_is_asked_for_comes_before_its_synonyms(image_folder):
    shutil.copytree(image_folder / "val", image_folder / "test")
    (image_folder / "test" / "cat" / "0.jpg").unlink()
    for split, images in (("validation", 4), ("test", 3)):
        config = DataConfig(root=str(image_folder), image_size=32, eval_split=split)
        assert len(build_images(config, TransformConfig()).held_out) == images


def test_grey_images_of_torchvision_become_rgb(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, images in (("train", 3), ("t10k", 2)):
        pixels = np.arange(images * 28 * 28, dtype=np.uint8).tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, images, 28, 28) + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, images) + bytes(range(images)))
    config = DataConfig(dataset="torch/mnist", root=str(tmp_path), image_size=28)
    source = build_images(config, TransformConfig(auto_augment="rand-m9", eval_crop=1.0))
    assert (len(source.train), len(source.held_out), source.num_classes, source.in_chans) == (3, 2, 10, 3)
    assert source.train[0][0].shape == (3, 28, 28)
    expected = torch.arange(28 * 28, dtype=torch.int).to(torch.uint8).reshape(1, 28, 28).expand(3, -1, -1)
    assert torch.equal(source.held_out[0][0], expected)


@pytest.mark.parametrize("policy", ["rand-m10-n1", "original", "augmix-m10"])
def test_no_bits_of_a_pixel_are_black(policy):
    """RandAugment asks for them at the magnitude 10, which Pillow refuses; timm's own table stays as it is."""
    parts = build_train_transform(TransformConfig(auto_augment=policy), 8).transforms
    ops = [
        op for part in parts for op in (*getattr(part, "ops", ()), *(o for p in getattr(part, "policy", ()) for o in p))
    ]
    posterizing = [op for op in ops if op.name.startswith("Posterize")]
    assert posterizing
    for op in posterizing:
        assert op.aug_fn(Image.new("RGB", (4, 4), "white"), 0).getpixel((0, 0)) == (0, 0, 0)
        assert op.aug_fn is not auto_augment.NAME_TO_OP[op.name]
