"""Which files of a folder are images, how they and their classes are numbered, and which data go with which weights."""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from engine.config import Config, DataConfig
from engine.data.datasets import Images, build_source, image_folder, image_suffixes, natural_order
from engine.data.source import IMAGENET, build_digits, build_synthetic, check_classes, check_resumed, fingerprint
from engine.errors import InputError

ROOT = Path(__file__).parents[2]
TIED = ("A", "a", "1", "01", "001", "Bee", "bee", "BEE", "x2y", "x02y")
FORMATS = (".jpg", ".JPEG", ".mpo", ".png", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm", ".jp2", ".tga", ".ico")
CHECKPOINT = Path("last.pt")


def make_class(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (16, 16), (200, 100, 50)).save(folder / name)


def test_the_order_is_timms_where_timm_has_one(tmp_path):
    generator = random.Random(0)
    words = ["img", "Img2_", "b", "Zebra", "n0", "ä", "x-", "x_", "x "]
    for number in range(12):
        make_class(
            tmp_path / f"{generator.choice(words)}{number * 7}",
            *{
                f"{generator.choice(words)}{generator.randrange(10**6)}.{generator.choice(['png', 'JPG', 'jpeg'])}"
                for _ in range(6)
            },
        )
    ours, timms = image_folder(tmp_path), ReaderImageFolder(str(tmp_path))
    assert ours.class_to_idx == timms.class_to_idx and ours.samples == timms.samples


def test_names_that_tie_have_an_order_of_their_own(tmp_path):
    """The same in every process, whatever its hash seed; timm's differs between these two."""
    for name in TIED:
        make_class(tmp_path / name, "1.png", "01.png")
    program = (
        "import sys; from pathlib import Path; from engine.data.datasets import image_folder; "
        "folder = image_folder(Path(sys.argv[1])); print(list(folder.class_to_idx), folder.samples)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1
    names = ["001", "01", "1", "A", "a", "BEE", "Bee", "bee", "x02y", "x2y"]
    assert list(image_folder(tmp_path).class_to_idx) == names
    others = [*TIED, "5²", "①", "٣", "½", "", "10", "9"]  # characters like digits too
    assert sorted(others, key=natural_order) == sorted(reversed(others), key=natural_order)


def test_every_format_that_pillow_reads_is_an_image_in_any_case(tmp_path, folder_config):
    for name in ("ant", "bee"):
        make_class(tmp_path / "train" / name, *(f"image{suffix}" for suffix in FORMATS))
        make_class(tmp_path / "val" / name, "image.webp")
    source = build_source(folder_config(tmp_path))
    assert len(source.train) == 2 * len(FORMATS) and len(source.held_out) == 2 and source.left_out == {}
    assert {source.train[index][0].shape for index in range(len(source.train))} == {(3, 16, 16)}
    assert not {".mpg", ".h5", ".grib", ".pdf", ".txt", ".wmf", ".eps"} & image_suffixes()
    assert ".avif" in image_suffixes()


def test_what_is_left_out_is_counted_and_names_need_not_be_utf_8(image_folder, folder_config):
    train = image_folder / "train"
    for hidden in (train, train / "cat"):
        make_class(hidden / ".ipynb_checkpoints", "copy.png")
    for name in ("cat/labels.txt", "dog/notes.TXT", "cat/.DS_Store", "README.md", "dog/LICENSE", "cat/deep/list.csv"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).touch()
    for split in ("train", "val"):
        os.rename(image_folder / split / "fox", os.fsencode(image_folder / split) + b"/f\xe9x")
    os.rename(train / "cat" / "0.jpg", os.fsencode(train) + b"/cat/\xe9.jpg")
    source = build_source(folder_config(image_folder))
    assert source.class_names == ("cat", "dog", "f\\xe9x") and len(source.train) == 24
    assert source.train[7][1] == 0 and len(source.facts["fingerprints"]["training"]["sha256"]) == 64
    counts = {"3 hidden", "2 .txt", "1 .md", "1 without suffix", "1 .csv"}
    assert {split: set(files.split(", ")) for split, files in source.left_out.items()} == {"training": counts}


def test_an_image_folder_with_faults_is_refused(image_folder, folder_config, tmp_path):
    def refused(message: str, root: Path = image_folder, with_training: bool = True, **data: object) -> None:
        with pytest.raises(InputError) as error:
            build_source(folder_config(root, **data), with_training)
        assert message in str(error.value)

    refused("no such folder", root=tmp_path / "nowhere")
    refused("no folder for the split holdout", eval_split="holdout")
    refused("data.dataset = hfds/nothing, root = ", dataset="hfds/nothing")
    refused("data.dataset = wds/cats: allowed is folder, digits, synthetic, or timm's torch/NAME", dataset="wds/cats")
    for split in ("train", "val"):  # timm would take `images` for the class of these
        for stray in ("0.jpg", "cat/images/0.jpg"):
            path = image_folder / split / stray
            path.parent.mkdir(exist_ok=True)
            shutil.copy(image_folder / split / "dog" / "0.jpg", path)
            refused(f"{split}/{stray}: an image must lie directly in a class folder of {image_folder / split}")
            path.unlink()
    (image_folder / "train" / "elk").mkdir()
    refused("elk: the class folder holds no image")
    Image.new("RGB", (8, 8)).save(image_folder / "train" / "elk" / "0.png")
    refused(f"data.root = {image_folder}: the splits have different classes: elk, fox")  # of which the number differs
    for folder in ("train/elk", "train/dog", "train/fox", "val/dog", "val/fox"):
        shutil.rmtree(image_folder / folder)
    for with_training in (True, False):
        refused(f"{image_folder}: the only class is cat, at least two are needed", with_training=with_training)
    shutil.rmtree(image_folder / "val" / "cat")
    refused("val: has no class folders")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "evaluation", "test"])
def test_the_held_out_images_are_those_of_their_folder(image_folder, folder_config, name):
    (image_folder / "val").rename(image_folder / name)
    for split in ("validation", name):
        assert len(build_source(folder_config(image_folder, eval_split=split)).held_out) == 9
    other = shutil.copytree(image_folder / name, image_folder / ("val" if name == "test" else "test"))
    (other / "cat" / "0.jpg").unlink()
    assert len(build_source(folder_config(image_folder, eval_split=other.name)).held_out) == 8
    shutil.rmtree(image_folder / "train")  # which an evaluation does not need
    assert len(build_source(folder_config(image_folder, eval_split=name), with_training=False).held_out) == 9


def test_grey_images_of_torchvision_become_rgb(tmp_path, folder_config):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, images in (("train", 3), ("t10k", 2)):
        pixels = np.arange(images * 28 * 28, dtype=np.uint8).tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, images, 28, 28) + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, images) + bytes(range(images)))
    config = folder_config(tmp_path, dataset="torch/mnist")
    config.data.image_size, config.transform.eval_crop = 28, 1.0
    source = build_source(config)
    assert (len(source.train), len(source.held_out), source.num_classes, source.in_chans) == (3, 2, 10, 3)
    assert source.train[0][0].shape == (3, 28, 28)
    expected = torch.arange(28 * 28, dtype=torch.int).to(torch.uint8).reshape(1, 28, 28).expand(3, -1, -1)
    assert torch.equal(source.held_out[0][0], expected)


def rename_class(*splits: Path) -> None:
    for split in splits:
        (split / "fox").rename(split / "elk")


def images_differ(split: str, found: int, before: int) -> str:
    return f"the {split} images are not those of last.pt: {found}, the run has {before}; or with other names or labels"


OTHER = "is for other classes than the data have, or numbers them in another order:"
CHANGES = {
    "added": (
        lambda train, val: shutil.copy(train / "cat/0.jpg", train / "cat/new.jpg"), images_differ("training", 25, 24)
    ),
    "removed": (lambda train, val: (train / "cat/0.jpg").unlink(), images_differ("training", 23, 24)),
    "moved": (
        lambda train, val: (train / "cat/0.jpg").rename(train / "dog/new.jpg"), images_differ("training", 24, 24)
    ),
    "renamed": (
        lambda train, val: (train / "cat/0.jpg").rename(train / "cat/zebra.jpg"), images_differ("training", 24, 24)
    ),
    "held out": (lambda train, val: (val / "cat/0.jpg").unlink(), images_differ("held-out", 8, 9)),
    "class": (rename_class, f"checkpoint last.pt {OTHER} 1 differ, number 2 is fox, in the data elk"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_its_own_images_only(image_folder, folder_config, change, caplog):
    config, (make, message) = folder_config(image_folder), CHANGES[change]
    saved = copy.deepcopy(build_source(config).facts)
    check_resumed(config, build_source(config), saved, CHECKPOINT)
    make(image_folder / "train", image_folder / "val")
    with pytest.raises(InputError) as error:
        check_resumed(config, build_source(config), saved, CHECKPOINT)
    assert str(error.value).startswith(f"--resume: {message}")
    assert str(error.value).endswith("; data.allow_mismatch=true goes on all the same") and not caplog.records
    config.data.allow_mismatch = True
    check_resumed(config, build_source(config), saved, CHECKPOINT)
    assert f"WARNING: --resume: {message}" in caplog.text


def test_where_the_images_lie_and_what_is_in_them_does_not_matter(image_folder, folder_config, tmp_path):
    before = build_source(folder_config(image_folder)).facts
    shutil.copytree(image_folder, tmp_path / "a" / "b")
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "b" / "train" / "cat" / "0.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    for root in (tmp_path / "a" / "b", tmp_path / "link", f"{tmp_path}/a/../a/b/"):
        assert build_source(folder_config(root)).facts == before


class Torchvisions:
    """A data set with the labels where torchvision has them."""

    def __init__(self, **labels: object) -> None:
        vars(self).update(labels)

    def __len__(self) -> int:
        return 3


def test_every_source_has_facts(image_folder, folder_config):
    prints = {
        fingerprint(Images(Torchvisions(**{name: kind(values)}), None, ""))["sha256"]
        for name in ("targets", "labels", "_labels")
        for kind in (list, np.array, torch.tensor)
        for values in ([0, 1, 1], [0, 1, 2])
    }
    assert len(prints) == 2  # one for each list of labels, whatever holds them
    assert fingerprint(Images(Torchvisions(), None, ""))["images"] == 3
    source = build_source(folder_config(image_folder / "train", dataset="torch/image_folder"))
    assert list(source.train.listing()) == [*"0" * 8, *"1" * 8, *"2" * 8]
    assert build_digits(8).facts["fingerprints"]["held-out"]["images"] == 797
    assert build_synthetic(8, samples=7).facts["fingerprints"]["training"]["images"] == 7
    assert IMAGENET.facts["class_names"][999] == "999"


def test_a_checkpoint_that_tells_nothing_is_not_compared(caplog):
    """Of a version before this one, or spoilt."""
    caplog.set_level(logging.INFO)
    for saved in ({}, {"class_names": None, "fingerprints": "x"}, {"class_names": [], "fingerprints": None}):
        caplog.clear()
        check_resumed(Config(), build_synthetic(8, samples=7), saved, CHECKPOINT)
        assert caplog.messages == [
            "checkpoint last.pt does not tell its images: whether the data are the same is not checked"
        ]
    with pytest.raises(InputError, match="the run has None;"):
        check_resumed(Config(), build_synthetic(8, samples=7), {"fingerprints": {"training": 3}}, CHECKPOINT)


def test_the_same_classes_in_another_order_and_more_of_them_are_refused():
    config = Config(data=DataConfig(allow_mismatch=True))
    check_classes(Config(), ("a", "b", "c"), ["a", "b", "c"], "F")
    for known in (["a", "c", "b"], ("a", "c", "b")):
        with pytest.raises(InputError, match=rf"^F {OTHER} 2 differ, number 1 is c, in the data b;"):
            check_classes(Config(), ("a", "b", "c"), known, "F")
        check_classes(config, ("a", "b", "c"), known, "F")
    for names, known in ((("a", "b", "c"), ["a", "b"]), (("a", "b"), ["a", "b", "c"])):
        with pytest.raises(InputError, match="1 differ, number 2 is"):  # whatever is meant, the outputs do not fit
            check_classes(config, names, known, "F")
