"""Grey images and images with any number of channels: their values, their way through a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import tools.export
import tools.predict
import tools.train_net
from engine.config import DataConfig
from engine.config_check import check
from engine.data.images import UnreadableImage, decode
from engine.data.loaders import DataLoaders
from engine.data.source import build_source
from engine.data.transforms import Normalise, normalisation
from engine.distributed import Process
from engine.errors import InputError

MODEL = ("model.name=vit_tiny_patch16_224", "model.pretrained=false", "data.image_size=16", "model.drop_path_rate=0")
SIZE = (
    "model.kwargs={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "augsub.sub_models=[{augmentations: [{name: masking, ratio: 0.5}]}]",
    *("train.global_batch=4", "train.epochs=2", "data.workers=0", "schedule.warmup_epochs=0"),
    *("transform.auto_augment=null", "evaluation.patience=null"),
)


def pixels(channels: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """(24, 32, C) random."""
    values = np.random.default_rng(seed).random((24, 32, channels))
    return values.astype(dtype) if dtype.startswith("f") else (values * np.iinfo(dtype).max).astype(dtype)


def write_folder(root: Path, channels: int) -> Path:
    """Two splits of two classes, of which one is brighter; TIFF with channels in each pixel."""
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                image = pixels(channels, seed=number) // 2 + 120 * label
                tifffile.imwrite(root / split / name / f"{number}.tif", image.astype(np.uint8), planarconfig="contig")
    return root


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_a_tiff_file_has_its_values_whatever_its_layout(tmp_path, dtype, layout):
    expected, path = pixels(5, dtype), tmp_path / "image.tif"
    if layout == "pages":
        tifffile.imwrite(path, expected.transpose(2, 0, 1), photometric="minisblack")
    else:
        image = expected if layout == "contig" else expected.transpose(2, 0, 1)
        tifffile.imwrite(path, image, planarconfig=layout, photometric="minisblack", extrasamples=[0] * 4)
    found = decode(path.open("rb"), DataConfig(in_chans=5))
    most = 1 if dtype == "float32" else np.iinfo(dtype).max
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1) / most, atol=1e-7)


def test_floats_between_0_and_1_are_no_photograph_instead_of_a_black_one(tmp_path):
    values = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    for most in (1, 200):
        Image.fromarray(values * most, "F").save(tmp_path / f"{most}.tif")
    with pytest.raises(ValueError, match="has float pixels between 0 and 1, which Pillow takes for black"):
        decode((tmp_path / "1.tif").open("rb"))
    assert np.abs(np.asarray(decode((tmp_path / "200.tif").open("rb")))[..., 0] - values * 200).max() < 1


def test_transparency_is_a_fourth_channel(tmp_path):
    expected = pixels(4)
    Image.fromarray(expected, "RGBA").save(tmp_path / "image.png")
    found = decode((tmp_path / "image.png").open("rb"), DataConfig(in_chans=4))
    assert (found * 255).round().byte().permute(1, 2, 0).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("policy", [None, "3a", "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2"])
def test_grey_images_have_one_channel_under_every_colour_policy(image_folder, folder_config, policy):
    config = folder_config(image_folder, in_chans=1)
    config.transform.auto_augment, config.transform.color_jitter = policy, None if policy else 0.4
    source = build_source(config)
    assert {tuple(source.train[index][0].shape) for index in range(len(source.train))} == {(1, 16, 16)}


def test_grey_is_the_brightness_of_the_colours_normalised_by_the_average(image_folder, folder_config):
    grey, coloured = (
        build_source(folder_config(image_folder, in_chans=channels)).held_out[0][0].float() for channels in (1, 3)
    )
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R 601-2, as Pillow has them
    assert ((coloured * weights).sum(0) - grey[0]).abs().max() < 2  # rounded before and after the resize
    config = folder_config(image_folder, in_chans=1)
    (mean,), (std,) = normalisation(config)
    assert mean == pytest.approx((0.485 + 0.456 + 0.406) / 3) and std == pytest.approx((0.229 + 0.224 + 0.225) / 3)
    batch, _ = next(iter(DataLoaders(config, build_source(config), Process(0, 1, torch.device("cpu"))).held_out))
    torch.testing.assert_close(batch[0], (grey / 255 - mean) / std)
    config.transform.mean, config.transform.std = [0.2], [0.1]
    assert normalisation(config) == ([0.2], [0.1])


def test_grey_images_that_are_kept_decoded_are_the_same(image_folder, folder_config):
    kept, read = (
        build_source(folder_config(image_folder, in_chans=1, cache=cache)).held_out for cache in ("ram", None)
    )
    kept.decode_all()
    assert all(torch.equal(kept[index][0], read[index][0]) for index in range(len(read)))


def test_many_channels_are_cropped_and_normalised_alike(tmp_path, folder_config):
    config = folder_config(write_folder(tmp_path, 6), in_chans=6, image_size=[24, 32])
    config.transform.auto_augment, config.transform.eval_crop = None, 1.0
    config.transform.mean, config.transform.std = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5] * 6
    source = build_source(config)
    loaders = DataLoaders(config, source, Process(0, 1, torch.device("cpu")))
    batch, _ = next(iter(loaders.held_out))
    files = sorted(tmp_path.glob("val/*/*.tif"))
    for image, file in zip(batch, files, strict=False):
        expected = torch.from_numpy(tifffile.imread(file)).permute(2, 0, 1) / 255
        mean = torch.tensor(config.transform.mean)[:, None, None]
        torch.testing.assert_close(image, (expected - mean) / 0.5, atol=1e-5, rtol=1e-5)
    batch, _ = next(loaders.train_from(0))
    assert batch.shape == (8, 6, 24, 32) and batch.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 5])
def test_a_run_its_export_and_its_predictions(call, tmp_path, channels):
    root = write_folder(tmp_path / "images", 3 if channels == 1 else channels)
    run = tmp_path / "run"
    settings = (f"data.root={root}", f"data.in_chans={channels}", f"output_dir={run}")
    code, _, error = call(tools.train_net, "--config", "scratch_folder", *settings, *MODEL, *SIZE)
    assert code == 0, error
    code, _, error = call(tools.export, run / "checkpoints" / "best.pt", tmp_path / "model.safetensors")
    assert code == 0, error
    rows = []
    for number, what in enumerate((run, tmp_path / "model.safetensors")):
        found = tmp_path / f"{number}.jsonl"
        code, _, error = call(tools.predict, what, root / "val", "--output", found)
        assert code == 0, error
        rows.append([{**json.loads(line), "model": ""} for line in found.read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 8
    code, _, error = call(tools.train_net, "--resume", run, "train.epochs=3", "train.extend=true")
    assert code == 0, error


def test_other_channels_than_the_images_have_are_told_before_training(call, tmp_path, image_folder):
    settings = (f"data.root={image_folder}", "data.in_chans=4", f"output_dir={tmp_path}/run")
    code, _, error = call(tools.train_net, "--config", "scratch_folder", *settings, *MODEL, *SIZE)
    assert code == 2 and error.count("\n") == 1
    assert "has 3 channels, data.in_chans = 4" in error and not (tmp_path / "run").exists()


def test_keys_that_do_not_go_with_the_number_of_channels(folder_config, tmp_path):
    config = folder_config(tmp_path, in_chans=5)
    with pytest.raises(InputError, match=r"^transform.auto_augment: is for images with .* data.in_chans = 5$"):
        check(config)
    config.transform.auto_augment, config.transform.mean = None, [0.5] * 4
    with pytest.raises(
        InputError, match=r"^transform.mean = .*: allowed is one number for each of 5 channels, or three"
    ):
        check(config)
    config = folder_config(tmp_path, dataset="digits", in_chans=3)
    with pytest.raises(InputError, match=r"^data.in_chans = 3: data.dataset = digits has 1$"):
        check(config)


def test_a_damaged_tiff_is_a_bad_file(folder_config, tmp_path):
    root = write_folder(tmp_path, 5)
    (root / "train" / "bright" / "0.tif").write_bytes(b"II*\0" + bytes(40))
    config = folder_config(root, in_chans=5)
    config.transform.auto_augment = None
    with pytest.raises(UnreadableImage, match=r"bright/0\.tif"):
        build_source(config).train[0]


def test_floats_are_normalised_and_stay_as_they_were():
    images = torch.rand(2, 4, 3, 3)
    before = images.clone()
    torch.testing.assert_close(Normalise([0.5] * 4, [0.25] * 4)(images), (before - 0.5) / 0.25)
    assert torch.equal(images, before)
