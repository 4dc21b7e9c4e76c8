"""tools/prepare_data.py: shards and smaller copies of folders and tables."""

from __future__ import annotations

import shutil

import pytest
from PIL import ExifTags, Image

from engine.config import DataConfig
from engine.data.images import decode
from tools import prepare_data


def test_no_image_is_lost_in_a_smaller_copy_and_none_lands_outside(image_folder, tmp_path, capsys):
    cats, copy = image_folder / "train" / "cat", tmp_path / "small"
    for name in ("0-8.jpg", "0.png", "0.webp"):  # beside 0.jpg, in the place of number 8 or after it
        Image.open(cats / "1.jpg").save(cats / name)
    (image_folder / "test" / "cat").mkdir(parents=True)
    assert prepare_data.main([str(image_folder), str(copy), "--resize", "30", "--jobs", "1"]) == 0
    assert "train: 27 images\nval: 9 images\nleft out: test/\n" in capsys.readouterr().out
    assert len([*copy.rglob("*.jpg")]) == 36
    (table := image_folder / "rows.csv").write_text(
        "path,labels,split\ntrain/cat/0.jpg,../../out,train\ntrain/cat/1.jpg,in,train\nval/cat/0.jpg,in,vall\n"
    )
    assert prepare_data.main([str(table), str(tmp_path / "y"), "--resize", "30", "--jobs", "1"]) == 2
    assert "0.jpg: its class '../../out' is no name of a folder" in capsys.readouterr().err
    assert prepare_data.main([str(table), str(tmp_path / "z"), "--jobs", "1"]) == 0
    assert "train: 2 images in 1 shards\nleft out: 1 rows of the split vall\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_prepared_data_are_always_the_same_and_smaller_where_asked(image_folder, tmp_path, capsys):
    shards, again = tmp_path / "shards", tmp_path / "again"
    for target, jobs in ((shards, "1"), (again, "2")):
        assert prepare_data.main([str(image_folder), str(target), "--samples-per-shard", "5", "--jobs", jobs]) == 0
    for path in shards.glob("*.tar"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    noted = Image.Exif()
    noted[ExifTags.Base.Orientation] = 6  # a camera that was turned by a quarter
    Image.open(turned := image_folder / "val" / "dog" / "2.jpg").save(turned, exif=noted)
    assert prepare_data.main([str(image_folder), str(tmp_path / "small"), "--resize", "30", "--jobs", "1"]) == 0
    files = sorted((tmp_path / "small").rglob("*.jpg"))
    assert len(files) == 33 and all(Image.open(file).size == (40, 30) for file in files)
    for respects, size in ((False, (40, 30)), (True, (30, 40))):
        with open(tmp_path / "small" / "val" / "dog" / "2.jpg", "rb") as opened:
            assert decode(opened, DataConfig(exif_orientation=respects)).size == size
    capsys.readouterr()
    for arguments, message in (
        ([str(image_folder), str(again)], "is not empty"),
        ([str(tmp_path / "small" / "train"), str(tmp_path / "x")], "neither a folder with train/<class>"),
        ([str(tmp_path / "nothing"), str(tmp_path / "x")], "neither a folder with train/<class>"),
        (
            [str(image_folder), str(tmp_path / "x"), "--samples-per-shard", "0"],
            "--samples-per-shard 0: allowed is 1 or more",
        ),
    ):
        assert prepare_data.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (image_folder / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    assert prepare_data.main([str(image_folder), str(tmp_path / "y"), "--resize", "30", "--jobs", "1"]) == 2
    assert "cat/0.jpg: cannot be read" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "y")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("data.max_megapixles=500", "max_megapixles"),
        ("data.max_megapixels=1.0e-6", "more than data.max_megapixels = 1e-06 allows"),
    ],
)
def test_settings_count_for_a_folder_too(image_folder, tmp_path, override, error, capsys):
    arguments = [str(image_folder), str(tmp_path / "small"), "--resize", "8", "--jobs", "1", override]
    assert prepare_data.main(arguments) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
