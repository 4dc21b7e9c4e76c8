"""Tables of images: the rows as they are, and one line for each thing that can be wrong with them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from engine.data.source import build_source
from engine.errors import InputError

ROWS = [
    ("train/cat/0.jpg", "pet|red", "train"), ("train/dog/1.jpg", "pet", "train"),
    ("train/fox/2.jpg", "wild|red", "train"), ("train/fox/3.jpg", "", "train"),
    ("val/cat/0.jpg", "pet", "val"), ("val/fox/1.jpg", "wild", "val"),
]  # fmt: skip


@pytest.fixture
def table(image_folder):
    """Writes the rows of a table beside the images."""

    def write(rows=ROWS, header=("path", "labels", "split"), name="labels.csv") -> Path:
        file = image_folder / name
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([dict(zip(header, row, strict=True)) for row in rows]), file)
            return file
        with open(file, "w", newline="") as opened:
            csv.writer(opened).writerows([header, *rows])
        return file

    return write


@pytest.fixture
def opened(folder_config, image_folder):
    def build(file: Path, metric: str = "map", **data):
        config = folder_config(image_folder, dataset="table", table=str(file), **data)
        config.evaluation.metric, config.loss.name = metric, "bce"
        return build_source(config)

    return build


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_several_labels_become_targets_of_zeros_and_ones(table, opened, name):
    source = opened(table(name=name))
    assert source.class_names == ("pet", "red", "wild") and source.has_several_labels
    assert source.train.labels.tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert [source.held_out[number][1].tolist() for number in range(2)] == [[1, 0, 0], [0, 0, 1]]


def test_a_column_for_each_class_and_other_names(table, opened, folder_config, image_folder):
    rows = [(path, int("pet" in labels), int("wild" in labels), split) for path, labels, split in ROWS]
    file = table(rows, ("file", "pet", "wild", "set"))
    columns = {"path": "file", "labels": ["pet", "wild"], "split": "set"}
    assert opened(file, columns=columns).train.labels.tolist() == [[1, 0], [1, 0], [0, 1], [0, 0]]
    rows[1] = (rows[1][0], "yes", *rows[1][2:])
    with pytest.raises(InputError, match=r"1 values are neither 0 nor 1: train/dog/1.jpg \(pet = yes\)"):
        opened(table(rows, ("file", "pet", "wild", "set")), columns=columns)


def test_one_label_of_each_image_is_a_class_number(table, opened):
    rows = [(path, labels.split("|")[0] or "wild", split) for path, labels, split in ROWS]
    source = opened(table(rows), metric="top1")
    assert source.class_names == ("pet", "wild") and not source.has_several_labels
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    message = "cat/0.jpg: has 2 labels, as have other than one 3 of 4 images: several labels need loss.name=bce and"
    with pytest.raises(InputError, match=message):
        opened(table(), metric="top1")


def test_images_of_one_label_are_chosen_by_class(table, opened, image_folder):
    """As of a folder: the same images held out, the same few, the same classes in the same order."""
    paths = sorted(image_folder.glob("*/*/*.jpg"))
    rows = [(path.relative_to(image_folder).as_posix(), path.parent.name, path.parts[-3]) for path in paths]
    file = table(rows)

    def counted(**data):
        source = opened(file, metric="top1", **data)
        return [np.bincount(images.labels).tolist() for images in (source.train, source.held_out)]

    assert counted() == [[8, 8, 8], [3, 3, 3]]
    assert counted(classes=["fox", "cat"]) == [[8, 8], [3, 3]] and counted(images_per_class=5)[0] == [5, 5, 5]
    assert counted(validation_share=0.25) == [[6, 6, 6], [2, 2, 2]]
    foxes = opened(file, metric="top1", classes=["fox", "cat"]).train
    assert {line.split("/")[-2]: label for line, label in zip(foxes.listing(), foxes.labels, strict=True)} == {
        "fox": 0,
        "cat": 1,
    }


def test_labels_are_numbers_and_lists_too(table, opened):
    paths = [(path, split) for path, _, split in ROWS]
    numbers = table([(path, n % 3, split) for n, (path, split) in enumerate(paths)], name="numbers.parquet")
    source = opened(numbers)
    assert source.class_names == ("0", "1", "2")
    assert source.train.labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    lists = table([(path, ["wild", "red"][: n % 3], split) for n, (path, split) in enumerate(paths)], name="l.parquet")
    source = opened(lists)
    assert source.class_names == ("red", "wild")
    assert source.train.labels.tolist() == [[0, 0], [0, 1], [1, 1], [0, 0]]


def test_a_split_has_one_name_and_what_has_none_is_told(table, opened, caplog):
    rows = [
        *ROWS,
        ("val/dog/0.jpg", "pet", "test"),
        ("val/dog/1.jpg", "pet", "vall"),
        ("val/cat/1.jpg", "pet", "Train"),
    ]
    source = opened(table([(path, labels, f" {split} ") for path, labels, split in rows]))
    assert (len(source.train), len(source.held_out)) == (4, 2)  # the rows of the split test are no part of val
    told = {"1 rows of the split vall", "1 rows of the split Train", "1 rows of the split test"}
    assert {*source.left_out["held-out"].split(", ")} == told
    assert len(opened(table(rows), eval_split="test").held_out) == 1
    with pytest.raises(InputError, match="has no column fold, but path, labels, split"):
        opened(table(rows), columns={"split": "fold"}, validation_share=0.5)


def test_classes_of_which_no_image_is_held_out_are_refused(table, opened):
    rows = [("train/cat/0.jpg", "a", "train"), ("train/cat/1.jpg", "b", "train"), ("val/cat/0.jpg", "c", "val")]
    with pytest.raises(InputError, match=r"data\.classes = \['a', 'b'\]: no held-out image has one of them"):
        opened(table(rows), "top1", classes=["a", "b"])


def test_a_share_of_the_rows_is_held_out_where_no_column_says_so(table, opened):
    source = opened(table([row[:2] for row in ROWS], ("path", "labels")), validation_share=0.3)
    assert (len(source.train), len(source.held_out)) == (4, 2)


REFUSED = {
    "missing": ([*ROWS, *((f"no/{number}.jpg", "pet", "train") for number in range(4))],
                "4 files are missing: {root}/no/0.jpg, {root}/no/1.jpg, {root}/no/2.jpg, …"),
    "twice": ([*ROWS, ROWS[0]], "1 images come twice: {root}/train/cat/0.jpg"),
    "empty": ([], "holds no row"),
    "split": ([(path, labels, "test2") for path, labels, _ in ROWS], "the split train (train, training), but test2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_table_is_refused_as_a_whole(table, opened, image_folder, kind):
    rows, message = REFUSED[kind]
    with pytest.raises(InputError) as error:
        opened(table(rows))
    assert message.format(root=image_folder) in str(error.value) and "\n" not in str(error.value)


def test_missing_columns_files_and_options_that_need_one_label(table, opened, tmp_path):
    with pytest.raises(InputError, match="has no column labels, but path, label, split"):
        opened(table(header=("path", "label", "split")))
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        opened(tmp_path / "none.csv")
    for key, value in {"sampling": "balanced", "classes": ["pet", "red"], "images_per_class": 2}.items():
        with pytest.raises(InputError, match=f"data.{key} = .*: not where images may have several labels"):
            opened(table(), **{key: value})
