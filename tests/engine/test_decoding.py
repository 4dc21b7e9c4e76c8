"""Image files of every kind become RGB: as in timm where timm is right, scaled to 8 bits where it would clip."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset

from engine.data.files import DecodingError, decode, naming_bad_files

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
RGB = Image.fromarray(PIXELS[..., :3])
GRAY_ALPHA = Image.fromarray(PIXELS[..., :2].copy(), "LA")
FRAMES = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
SIXTEEN_BITS = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(decode(io.BytesIO(content)))


ORDINARY = {
    "RGB JPEG": lambda: encoded(RGB, "JPEG"),
    "gray JPEG": lambda: encoded(RGB.convert("L"), "JPEG"),
    "CMYK JPEG": lambda: encoded(RGB.convert("CMYK"), "JPEG"),
    "palette PNG": lambda: encoded(RGB.convert("P"), "PNG"),
    "palette PNG, one transparent colour": lambda: encoded(RGB.convert("P"), "PNG", transparency=3),
    "palette PNG, alpha per colour": lambda: encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256))),
    "gray PNG, one transparent value": lambda: encoded(RGB.convert("L"), "PNG", transparency=3),
    "RGBA PNG": lambda: encoded(Image.fromarray(PIXELS), "PNG"),
    "gray PNG with alpha": lambda: encoded(GRAY_ALPHA, "PNG"),
    "1-bit PNG": lambda: encoded(RGB.convert("1"), "PNG"),
    "RGB WebP": lambda: encoded(RGB, "WEBP"),
    "still GIF": lambda: encoded(RGB.convert("P"), "GIF", transparency=3),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_files_have_the_pixels_that_timm_gives_them(kind, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(ORDINARY[kind]())  # timm finds it by that ending, Pillow by its content
    files = ImageDataset(str(tmp_path), transform=np.asarray)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = files[0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Pillow says of transparency is no news
        pixels, label = naming_bad_files(files, "training")[0]
    assert pixels.shape == (20, 30, 3) and label == 0
    np.testing.assert_array_equal(pixels, expected)


def test_alpha_is_dropped_and_not_blended():
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(PIXELS), "PNG")), PIXELS[..., :3])
    np.testing.assert_array_equal(decoded(encoded(GRAY_ALPHA, "PNG"))[..., 2], PIXELS[..., 0])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    np.testing.assert_array_equal(decoded(content), np.broadcast_to([255, 0, 0], (8, 8, 3)))


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits_become_the_nearest_eight(kind, order):
    content = encoded(Image.fromarray(SIXTEEN_BITS.astype(order)), kind)
    assert Image.open(io.BytesIO(content)).mode == ("I;16B" if order == ">u2" else "I;16")
    expected = np.rint(SIXTEEN_BITS / 65535.0 * 255.0)
    np.testing.assert_array_equal(decoded(content), np.stack([expected] * 3, axis=-1))


def test_sixteen_bits_in_integers():
    content = b"P5 256 256 65535\n" + SIXTEEN_BITS.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(content)).mode == "I"
    np.testing.assert_array_equal(decoded(content)[..., 1], np.rint(SIXTEEN_BITS / 257.0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),  # more than 16 bits: between the extremes
        ([0.0, 0.25, 1.0], [0, 64, 255]),
        ([0.0, 7.4, 255.0], [0, 7, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-2.0, 0.0, 2.0], [0, 128, 255]),
        ([np.nan, 1.0, np.inf], [255, 255, 255]),
        ([0.0, np.nan, np.inf], [0, 0, 0]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_numbers_without_a_declared_range(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32 if isinstance(values[0], int) else np.float32))
    assert image.mode in ("I", "F")
    np.testing.assert_array_equal(decoded(encoded(image, "TIFF"))[0, :, 0], expected)


def bomb() -> bytes:
    """The head of a PNG file of 100000 x 100000 pixels."""
    size = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


JPEG, PNG = encoded(RGB, "JPEG"), encoded(RGB, "PNG")
NO_IMAGES = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404 not found</html>", "not an image that Pillow knows"),
    "truncated JPEG": (JPEG[:-100], "image file is truncated"),
    "truncated JPEG, head only": (JPEG[:100], "Truncated File Read"),
    "truncated PNG": (PNG[: len(PNG) // 2], "image file is truncated"),
    "damaged PNG": (PNG[:60] + bytes(50) + PNG[110:], "PNG|decod|broken|truncated|error"),
    "bomb": (bomb(), r"Image size \(10000000000 pixels\) exceeds limit"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_whole_image_is_told_in_one_line(kind):
    content, reason = NO_IMAGES[kind]
    with pytest.raises(DecodingError, match=reason) as error:
        decoded(content)
    assert "\n" not in str(error.value) and "BytesIO" not in str(error.value)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_exif_orientation_is_not_applied_as_in_timm(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "0.jpg"
    Image.new("RGB", (24, 8), (200, 10, 10)).save(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == orientation
    with open(path, "rb") as file:
        image = decode(file)
    assert image.size == (24, 8)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))
