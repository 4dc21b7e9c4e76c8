"""Which files are images, what they become and how they are numbered, and which data go with which weights."""

from __future__ import annotations

import copy
import io
import logging
import os
import random
import shutil
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from engine.config import Config, DataConfig
from engine.data.files import image_folder, image_suffixes, natural_order
from engine.data.images import Images, UnreadableImage
from engine.data.source import IMAGENET, build_digits, build_source, build_synthetic, check_classes, check_resumed
from engine.data.transforms import build_transform
from engine.errors import InputError

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
    """The same in every process; timm's differs with the seed of Python's hashes."""
    for name in TIED:
        make_class(tmp_path / name, "1.png")
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


def test_a_share_of_each_class_and_a_number_of_its_images_are_always_the_same_ones(image_folder, folder_config):
    """Of eight images of each class a quarter is held out, and three of the others are enough."""

    def listed(seed: int = 0, **data: object) -> tuple[set[str], ...]:
        config = folder_config(image_folder, **data)
        config.seed = seed
        source = build_source(config)
        return tuple(set(images.listing()) for images in (source.train, source.held_out))

    everything = listed()[0]
    train, held_out = listed(validation_share=0.25)
    assert train | held_out == everything and not train & held_out and len(held_out) == 6
    few, same = listed(seed=7, validation_share=0.25, images_per_class=3)
    assert same == held_out and few < train
    for images, count in ((held_out, 2), (few, 3)):
        assert Counter(line.split("\0")[0].split("/")[1] for line in images) == dict.fromkeys(
            ("cat", "dog", "fox"), count
        )
    assert listed(images_per_class=100)[0] == everything and listed(images_per_class=3)[1] == listed()[1]
    shutil.rmtree(image_folder / "val")  # nobody needs it
    config = folder_config(image_folder, validation_share=0.25, images_per_class=3)
    evaluated = build_source(config, with_training=False).held_out
    assert set(evaluated.listing()) == held_out
    numbers = [sorted(everything).index(line) for line in evaluated.listing()]
    files = image_folder_of(image_folder / "train", config)
    assert all(torch.equal(evaluated[at][0], files[number][0]) for at, number in enumerate(numbers))


def test_some_of_the_classes_in_an_order_of_ones_own(image_folder, folder_config):
    chosen = {"classes": ["fox", "cat"], "validation_share": 0.25, "images_per_class": 5}
    for data, sizes in (({"classes": ["fox", "cat"]}, (16, 6)), (chosen, (10, 4))):
        source = build_source(folder_config(image_folder, **data))
        assert source.class_names == ("fox", "cat") and source.num_classes == 2
        for images, size in zip((source.train, source.held_out), sizes, strict=True):
            listed = [line.split("\0")[0].split("/")[1] for line in images.listing()]
            labels = [images[index][1] for index in range(len(images))]
            assert len(images) == size and [("fox", "cat")[label] for label in labels] == listed
    numbers = {"dataset": "torch/image_folder", "classes": ["fox", "dog"]}  # another library's labels
    source = build_source(folder_config(image_folder / "train", **numbers))
    assert [source.held_out[index][1] for index in (0, 7, 8, 15)] == [1, 1, 0, 0]


def image_folder_of(root: Path, config: Config) -> Images:
    """All images of a folder as an evaluation sees them."""
    return Images(image_folder(root), build_transform(config, is_training=False), "training")


def test_an_image_folder_with_faults_is_refused(image_folder, folder_config, tmp_path):
    def refused(message: str, root: Path = image_folder, with_training: bool = True, **data: object) -> None:
        with pytest.raises(InputError) as error:
            build_source(folder_config(root, **data), with_training)
        assert message in str(error.value)

    refused("no such folder", root=tmp_path / "nowhere")
    refused("no folder for the split holdout", eval_split="holdout")
    refused("data.dataset = hfds/nothing, root = ", dataset="hfds/nothing")
    refused("data.validation_share = 0.9: leaves a class no training image", validation_share=0.9)
    refused("data.classes: catt is none of the classes, did you mean 'cat'?", classes=["catt", "dog"])
    refused("data.classes: cat comes twice", classes=["cat", "cat"])
    refused("the only class is cat, at least two are needed", classes=["cat"])
    refused("data.cache: not with data.dataset = digits, which is split", dataset="digits", cache="ram")
    refused("are read with data.dataset=parquet data.train_split=hf://datasets/cats/data/train", dataset="hfids/cats")
    refused("data.dataset = tfds/cats: allowed is folder, table, wds, parquet, digits", dataset="tfds/cats")
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
    refused(
        f"data.root = {image_folder}: the splits have different classes: elk in training alone"
    )  # of which the number differs
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


OTHER = "is for other classes than the data have, or numbers them in another order:"


@pytest.mark.parametrize(
    ("change", "old", "new", "message"),
    [
        (shutil.copy, "train/cat/0.jpg", "train/cat/new.jpg", "training images are not those of last.pt: 25, the run "),
        (os.rename, "train/cat/0.jpg", "train/cat/new.txt", "training images are not those of last.pt: 23, the run "),
        (os.rename, "train/cat/0.jpg", "train/dog/new.jpg", "training images are not those of last.pt: 24, the run "),
        (os.rename, "train/cat/0.jpg", "train/cat/new.jpg", "training images are not those of last.pt: 24, the run "),
        (os.rename, "val/cat/0.jpg", "val/cat/new.txt", "held-out images are not those of last.pt: 8, the run has 9; "),
    ],
)
def test_a_run_goes_on_with_its_own_images_only(image_folder, folder_config, change, old, new, message, caplog):
    config = folder_config(image_folder)
    saved = copy.deepcopy(build_source(config).facts)
    check_resumed(config, build_source(config), saved, CHECKPOINT)
    change(image_folder / old, image_folder / new)
    with pytest.raises(InputError) as error:
        check_resumed(config, build_source(config), saved, CHECKPOINT)
    assert str(error.value).startswith(f"--resume: the {message}")
    assert str(error.value).endswith("; data.allow_mismatch=true goes on all the same") and not caplog.records
    config.data.allow_mismatch = True
    check_resumed(config, build_source(config), saved, CHECKPOINT)
    assert f"WARNING: --resume: the {message}" in caplog.text


def test_where_the_images_lie_and_what_is_in_them_does_not_matter(image_folder, folder_config, tmp_path):
    before = build_source(folder_config(image_folder)).facts
    shutil.copytree(image_folder, tmp_path / "a" / "b")
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "b" / "train" / "cat" / "0.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    for root in (tmp_path / "a" / "b", tmp_path / "link", f"{tmp_path}/a/../a/b/"):
        assert build_source(folder_config(root)).facts == before


def test_every_source_has_facts(image_folder, folder_config):
    for name in ("targets", "labels", "_labels"):
        for labels in ([0, 1, 1], np.array([0, 1, 1]), torch.tensor([0, 1, 1])):
            items = type("Items", (list,), {name: labels})(range(3))
            assert [*Images(items, None, "").listing()] == ["0", "1", "1"]
    assert not [*Images(range(3), None, "").listing()]
    source = build_source(folder_config(image_folder / "train", dataset="torch/image_folder"))
    assert [*source.train.listing()] == [*"0" * 8, *"1" * 8, *"2" * 8]
    (image_folder / "train/cat/4.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="training image 4"):  # of a file that another library opens
        source.train[4]
    assert build_digits(8).facts["fingerprints"]["held-out"]["images"] == 797
    assert build_synthetic(8, samples=7).facts["fingerprints"]["training"]["images"] == 7
    assert IMAGENET.facts["class_names"][999] == "999"


def test_a_checkpoint_that_tells_nothing_is_not_compared(caplog):
    """Of a version before this one, or spoilt."""
    caplog.set_level(logging.INFO)
    for saved in ({}, {"class_names": None, "fingerprints": "x"}, {"class_names": [], "fingerprints": None}):
        caplog.clear()
        check_resumed(Config(), build_synthetic(8, samples=7), saved, CHECKPOINT)
        assert "checkpoint last.pt does not tell its images" in caplog.text
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


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
RGB, RGBA = Image.fromarray(PIXELS[..., :3]), Image.fromarray(PIXELS)
GRAY_ALPHA = Image.fromarray(PIXELS[..., :2].copy(), "LA")
FRAMES = [Image.new("RGB", (30, 20), color) for color in ("red", "lime", "blue")]
SIXTEEN_BITS = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def decoded(tmp_path):
    """Gives the pixels of a file's content; the file is called .png, whatever it is, so that timm finds it too."""
    (tmp_path / "cat").mkdir()

    def pixels(content: bytes) -> np.ndarray:
        (tmp_path / "cat" / "0.png").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Pillow says of transparency is no news
            image, label = Images(image_folder(tmp_path), np.asarray, "training")[0]
        assert label == 0
        return image

    return pixels


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, "JPEG", exif=exif)


AS_IN_TIMM = {
    "RGB JPEG": lambda: encoded(RGB, "JPEG"),
    "gray JPEG": lambda: encoded(RGB.convert("L"), "JPEG"),
    "CMYK JPEG": lambda: encoded(RGB.convert("CMYK"), "JPEG"),
    "palette PNG": lambda: encoded(RGB.convert("P"), "PNG"),
    "palette PNG, one transparent colour": lambda: encoded(RGB.convert("P"), "PNG", transparency=3),
    "palette PNG, alpha per colour": lambda: encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256))),
    "gray PNG, one transparent value": lambda: encoded(RGB.convert("L"), "PNG", transparency=3),
    "RGBA PNG": lambda: encoded(RGBA, "PNG"),
    "gray PNG with alpha": lambda: encoded(GRAY_ALPHA, "PNG"),
    "1-bit PNG": lambda: encoded(RGB.convert("1"), "PNG"),
    "RGB WebP": lambda: encoded(RGB, "WEBP"),
    "still GIF": lambda: encoded(RGB.convert("P"), "GIF", transparency=3),
    "EXIF orientation": lambda: turned(6),
}


@pytest.mark.parametrize("kind", AS_IN_TIMM)
def test_ordinary_files_have_the_pixels_that_timm_gives_them(kind, decoded, tmp_path):
    pixels = decoded(AS_IN_TIMM[kind]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ImageDataset(str(tmp_path), transform=np.asarray)[0][0]
    assert pixels.shape == (20, 30, 3)
    np.testing.assert_array_equal(pixels, expected)


FIRST = [255, 0, 0]
DECODED = {
    "RGBA, alpha dropped and not blended": (lambda: encoded(RGBA, "PNG"), PIXELS[..., :3]),
    "gray and alpha": (lambda: encoded(GRAY_ALPHA, "PNG"), PIXELS[..., :1]),
    "animated GIF": (lambda: encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), FIRST),
    "animated PNG": (lambda: encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), FIRST),
    "animated WebP": (
        lambda: encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
        FIRST,
    ),
    **{
        f"16 bits, {kind} {order}": (
            lambda kind=kind, order=order: encoded(Image.fromarray(SIXTEEN_BITS.astype(order)), kind),
            np.rint(SIXTEEN_BITS / 65535.0 * 255.0)[..., None],
        )
        for kind, order in (("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"))
    },
    "16 bits in integers": (
        lambda: b"P5 256 256 65535\n" + SIXTEEN_BITS.astype(">u2").tobytes(),
        np.rint(SIXTEEN_BITS / 257.0)[..., None],
    ),
}


@pytest.mark.parametrize("kind", DECODED)
def test_other_files_have_the_pixels_that_they_should(kind, decoded):
    content, expected = DECODED[kind]
    pixels = decoded(content())
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, pixels.shape))


def bomb() -> bytes:
    """The head of a PNG file of 100000 x 100000 pixels."""
    size = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


JPEG, PNG = encoded(RGB, "JPEG"), encoded(RGB, "PNG")
NO_IMAGES = {
    "empty": (b"", "not an image that Pillow knows"),
    "text": (b"<html>404 not found</html>", "not an image that Pillow knows"),
    "truncated JPEG": (JPEG[:-100], "image file is truncated"),
    "truncated JPEG, head only": (JPEG[:100], "Truncated File Read"),
    "truncated PNG": (PNG[: len(PNG) // 2], "image file is truncated"),
    "damaged PNG": (PNG[:60] + bytes(50) + PNG[110:], "PNG|decod|broken|truncated|error"),
    "bomb": (bomb(), "100000 x 100000 pixels are 10000.0 million, more than data.max_megapixels = 179 allows"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_whole_image_is_told_with_its_name_in_one_line(kind, decoded, tmp_path):
    content, reason = NO_IMAGES[kind]
    with pytest.raises(UnreadableImage, match=reason) as error:
        decoded(content)
    assert error.value.args[0] == f"{tmp_path}/cat/0.png" and "\n" not in error.value.args[1]
