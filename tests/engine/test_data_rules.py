"""Fingerprints of data sets, and which data go with which weights."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from engine.config import Config, DataConfig, TransformConfig
from engine.data.datasets import build_images
from engine.data.files import OtherImages
from engine.data.rules import check_classes, check_resumed
from engine.data.source import IMAGENET, DataSource, build_digits, build_synthetic, fingerprint
from engine.errors import InputError

CHECKPOINT = Path("last.pt")


def opened(root: Path) -> DataSource:
    return build_images(DataConfig(root=str(root), image_size=32), TransformConfig())


def config(allow_mismatch: bool = False) -> Config:
    return Config(data=DataConfig(allow_mismatch=allow_mismatch))


def added(root: Path) -> None:
    shutil.copy(root / "train/cat/0.jpg", root / "train/cat/new.jpg")


def removed(root: Path) -> None:
    (root / "train/cat/0.jpg").unlink()


def moved(root: Path) -> None:
    (root / "train/cat/0.jpg").rename(root / "train/dog/new.jpg")


def renamed(root: Path) -> None:
    (root / "train/cat/0.jpg").rename(root / "train/cat/zebra.jpg")


def held_out_added(root: Path) -> None:
    shutil.copy(root / "val/cat/0.jpg", root / "val/cat/new.jpg")


def class_renamed(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "fox").rename(root / split / "elk")


def class_added(root: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(root / split / "cat", root / split / "cow")


SAME = "the training images are not those of last.pt: 24, as before, with other names or labels"
CHANGES = {
    added: "the training images are not those of last.pt: 25, the run has 24",
    removed: "the training images are not those of last.pt: 23, the run has 24",
    moved: SAME,
    renamed: SAME,
    held_out_added: "the held-out images are not those of last.pt: 10, the run has 9",
    class_renamed: "checkpoint last.pt is for other classes than the data have: the data lack fox and also have elk",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_its_own_images_only(image_folder, change, caplog):
    saved = copy.deepcopy(opened(image_folder).facts)
    check_resumed(config(), opened(image_folder), saved, CHECKPOINT)
    change(image_folder)
    with pytest.raises(InputError) as error:
        check_resumed(config(), opened(image_folder), saved, CHECKPOINT)
    assert str(error.value) == f"--resume: {CHANGES[change]}; data.allow_mismatch=true goes on all the same"
    assert not caplog.records
    check_resumed(config(allow_mismatch=True), opened(image_folder), saved, CHECKPOINT)
    assert f"WARNING: --resume: {CHANGES[change]} (data.allow_mismatch)" in caplog.text


def test_another_number_of_classes_cannot_be_meant(image_folder):
    saved = opened(image_folder).facts
    class_added(image_folder)
    with pytest.raises(InputError, match=r"the data also have cow$"):
        check_resumed(config(allow_mismatch=True), opened(image_folder), saved, CHECKPOINT)


def test_where_the_images_lie_and_what_is_in_them_does_not_matter(image_folder, tmp_path):
    before = opened(image_folder).facts
    shutil.copytree(image_folder, tmp_path / "a" / "b")
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "b" / "train" / "cat" / "0.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    for root in (tmp_path / "a" / "b", tmp_path / "link", f"{tmp_path}/a/../a/b/"):
        assert opened(root).facts == before


def test_a_name_that_is_no_text_has_a_fingerprint(image_folder):
    before = opened(image_folder).facts
    (image_folder / "train/cat/0.jpg").rename(str(image_folder / "train/cat") + "/\udcff.jpg")
    assert opened(image_folder).facts["fingerprints"]["training"] != before["fingerprints"]["training"]


class Torchvisions:
    """A data set with the labels where torchvision has them."""

    def __init__(self, **labels):
        vars(self).update(labels)

    def __len__(self) -> int:
        return 3


def test_of_other_data_sets_the_labels_count():
    prints = {
        fingerprint(OtherImages(Torchvisions(**{name: kind(values)}), "training"))["sha256"]
        for name in ("targets", "labels", "_labels")
        for kind in (list, np.array, torch.tensor)
        for values in ([0, 1, 1], [0, 1, 2])
    }
    assert len(prints) == 2  # one for each list of labels, whatever holds them
    assert fingerprint(OtherImages(Torchvisions(), "training"))["images"] == 3


def test_torchvisions_folder_lists_its_labels(image_folder):
    listing = list(OtherImages(ImageFolder(image_folder / "train"), "training").listing())
    assert listing == ["0"] * 8 + ["1"] * 8 + ["2"] * 8


def test_every_source_has_facts():
    assert build_digits(8).facts["fingerprints"]["held-out"]["images"] == 797
    assert build_synthetic(8, samples=7).facts["fingerprints"]["training"]["images"] == 7
    assert IMAGENET.facts["class_names"][999] == "999"


def test_a_checkpoint_that_tells_nothing_is_not_compared(caplog):
    """Of a version before this one, or spoilt."""
    source = build_synthetic(8, samples=7)
    for saved in ({}, {"class_names": None, "fingerprints": "x"}, {"class_names": [1, 2], "fingerprints": None}):
        with caplog.at_level(logging.INFO):
            check_resumed(config(), source, saved, CHECKPOINT)
        assert [record.message for record in caplog.records] == [
            "checkpoint last.pt does not tell its images: whether the data are the same is not checked"
        ]
        caplog.clear()
    with pytest.raises(InputError, match="the run has None; "):
        check_resumed(config(), source, {"fingerprints": {"training": 3}}, CHECKPOINT)


def test_the_same_classes_in_another_order_are_refused():
    for known in (["a", "c", "b"], ("a", "c", "b")):
        with pytest.raises(
            InputError, match=r"^F numbers the classes of the data in another order: 1 is c, in the data b;"
        ):
            check_classes(config(), ("a", "b", "c"), known, "F")
    check_classes(config(), ("a", "b", "c"), ["a", "b", "c"], "F")


def test_of_many_classes_a_few_are_named():
    names, known = [f"new{n}" for n in range(1000)], [f"old{n}" for n in range(1000)]
    with pytest.raises(InputError) as error:
        check_classes(config(), names, known, "F")
    assert "the data lack old0, old1, old2 and 997 more and also have new0, new1, new2 and 997 more; " in str(
        error.value
    )
