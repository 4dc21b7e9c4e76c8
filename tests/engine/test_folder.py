"""Which files of a folder are images, and in which order they and their classes are numbered."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder

from engine.config import DataConfig, TransformConfig
from engine.data.datasets import build_images
from engine.data.files import DecodingError, ImageFiles, ImageFolder, UnreadableImage, image_suffixes, natural_order
from engine.data.transforms import build_eval_transform
from engine.errors import InputError

ROOT = Path(__file__).parents[2]
TIED = ("A", "a", "1", "01", "001", "Bee", "bee", "BEE", "x2y", "x02y")
FORMATS = (".jpg", ".JPEG", ".mpo", ".png", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm", ".jp2", ".tga", ".ico")


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
    ours, timms = ImageFolder(tmp_path), ReaderImageFolder(str(tmp_path))
    assert ours.class_to_idx == timms.class_to_idx
    assert ours.samples == timms.samples
    assert [ours.filename(index) for index in range(len(ours))] == [timms.filename(i) for i in range(len(timms))]


def test_names_that_tie_have_an_order_of_their_own(tmp_path):
    """The same in every process, whatever its hash seed; timm's differs between these two."""
    for name in TIED:
        make_class(tmp_path / name, "1.png", "01.png")
    program = (
        "import sys; from pathlib import Path; from engine.data.files import ImageFolder; "
        "folder = ImageFolder(Path(sys.argv[1])); print(list(folder.class_to_idx), folder.samples)"
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
    assert list(ImageFolder(tmp_path).class_to_idx) == [
        "001", "01", "1", "A", "a", "BEE", "Bee", "bee", "x02y", "x2y",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["5²", "①", "a①b", "٣", "½", "x₂"])
def test_characters_like_digits_are_no_obstacle(name, tmp_path):
    make_class(tmp_path / name, f"{name}.png", "2.png", "10.png")
    make_class(tmp_path / "other", "0.png")
    folder = ImageFolder(tmp_path)
    assert set(folder.class_to_idx) == {name, "other"} and len(folder) == 4


def test_the_key_is_a_total_order():
    names = [*TIED, "5²", "5", "²", "", "10", "9"]
    assert sorted(names, key=natural_order) == sorted(reversed(names), key=natural_order)


def test_every_format_that_pillow_reads_is_an_image_in_any_case(tmp_path):
    for name in ("ant", "bee"):
        make_class(tmp_path / "train" / name, *(f"image{suffix}" for suffix in FORMATS))
        make_class(tmp_path / "val" / name, "image.webp")
    source = build_images(DataConfig(root=str(tmp_path), image_size=16), TransformConfig())
    assert len(source.train) == 2 * len(FORMATS) and len(source.held_out) == 2
    for index in range(len(source.train)):
        image, _ = source.train[index]
        assert image.shape == (3, 16, 16)
    assert source.left_out == {}


def test_what_cannot_be_decoded_is_no_image():
    assert not {".mpg", ".h5", ".grib", ".pdf", ".txt", ".wmf"} & image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"} <= image_suffixes()


def test_what_is_left_out_is_counted(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            make_class(tmp_path / split / name, "0.png")
    train = tmp_path / "train"
    make_class(train / ".ipynb_checkpoints", "copy.png")  # no class
    make_class(train / "ant" / ".ipynb_checkpoints", "copy.png")
    for name in ("ant/labels.txt", "bee/notes.TXT", "ant/.DS_Store", "README.md", "bee/LICENSE", "ant/deep/list.csv"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_text("")
    source = build_images(DataConfig(root=str(tmp_path), image_size=16), TransformConfig())
    assert source.class_names == ("ant", "bee") and len(source.train) == 2
    assert set(source.left_out) == {"training"}
    assert set(source.left_out["training"].split(", ")) == {
        "3 hidden", "2 .txt", "1 .md", "1 without suffix", "1 .csv",
    }  # fmt: skip


def test_a_class_whose_name_is_no_utf8_is_a_class_with_escapes_in_its_name(tmp_path):
    for split in ("train", "val"):
        make_class(tmp_path / split / "ant", "0.png")
        shutil.copytree(os.fsencode(tmp_path / split / "ant"), os.fsencode(tmp_path / split) + b"/b\xe9e")
    source = build_images(DataConfig(root=str(tmp_path), image_size=16), TransformConfig())
    assert source.class_names == ("ant", "b\\xe9e")
    assert len(source.train) == 2


def test_a_file_whose_name_is_no_utf8_is_an_image(tmp_path):
    make_class(tmp_path / "ant", "0.png")
    shutil.copy(tmp_path / "ant" / "0.png", os.fsencode(tmp_path) + b"/ant/\xe9.png")
    images = ImageDataset(str(tmp_path), reader=ImageFolder(tmp_path), transform=lambda image: image.size)
    dataset = ImageFiles(images, "training")
    assert [dataset[index][0] for index in range(len(dataset))] == [(16, 16)] * 2


def test_an_image_that_a_transform_leaves_nothing_of_is_a_bad_file(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            make_class(tmp_path / split / name, "0.png")
    Image.new("RGB", (6000, 1)).save(tmp_path / "val" / "bee" / "0.png")
    source = build_images(DataConfig(root=str(tmp_path), image_size=32), TransformConfig(eval_crop_mode="border"))
    with pytest.raises(UnreadableImage) as error:
        source.held_out[1]
    name, reason = error.value.args
    assert name.endswith("val/bee/0.png")
    assert reason == "6000 x 1 pixels, of which transform.eval_crop_mode=border leaves less than a row"


@pytest.mark.parametrize(
    ("size", "image_size", "crop"), [((73, 1), 32, 0.875), ((71, 1), 32, 0.875), ((3, 449), 224, 1)]
)
def test_whatever_timms_border_mode_can_resize_is_no_bad_file(size, image_size, crop):
    """It leaves a row, if only one; of 73 x 1 pixels, less than half of one."""
    settings = {"crop_pct": crop, "crop_mode": "border", "normalize": False, "interpolation": "bicubic"}
    ours = build_eval_transform(TransformConfig(eval_crop_mode="border", eval_crop=crop), image_size)
    image = Image.new("RGB", size, "red")
    if size == (73, 1):
        with pytest.raises(ValueError, match="must be > 0"):
            create_transform(image_size, **settings)(image)
        with pytest.raises(DecodingError, match="73 x 1 pixels"):
            ours(image)
    else:
        mean = TransformConfig().mean
        assert ours(image).equal(create_transform(image_size, mean=tuple(mean), **settings)(image))


def test_a_class_of_files_that_pillow_does_not_read_tells_what_they_are(tmp_path):
    make_class(tmp_path / "ant", "0.png")
    make_class(tmp_path / "bee")
    for name in ("0.HEIC", "1.heic", "notes.txt", ".hidden.png"):
        (tmp_path / "bee" / name).write_text("")
    with pytest.raises(InputError, match=r"bee: the class folder holds no image itself, only files \.heic, \.txt$"):
        ImageFolder(tmp_path)
