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

from engine.data.datasets import Images, UnreadableImage, image_folder

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
    "bomb": (bomb(), r"Image size \(10000000000 pixels\) exceeds limit"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_whole_image_is_told_with_its_name_in_one_line(kind, decoded, tmp_path):
    content, reason = NO_IMAGES[kind]
    with pytest.raises(UnreadableImage, match=reason) as error:
        decoded(content)
    assert error.value.args[0] == f"{tmp_path}/cat/0.png" and "\n" not in error.value.args[1]
