"""Image files that any reader can open."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchgen.images.files import ImageFormat, _font, caption_lines, contact_sheet, encode_image
from batchgen.images.provenance import SOURCE_TYPE

Array = np.ndarray[Any, Any]


def noise(width: int = 8, height: int = 8, channels: int = 3) -> Array:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8)


def photo(size: int = 64) -> Array:
    """Smooth, as what lossy codecs are made for."""
    ramp = np.linspace(0, 255, size)
    red, green = np.meshgrid(ramp, ramp)
    return np.stack([red, green, 255 - red], axis=-1).astype(np.uint8)


def file_of(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (1, 9), (7, 3), (64, 48), (512, 512)])
def test_png_is_exact_and_whole(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    data = encode_image(pixels, "png", 95)
    with Image.open(io.BytesIO(data)) as image:
        image.verify()  # every chunk's checksum
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", size)
        assert np.array_equal(np.asarray(image), pixels)


def test_png_of_a_view_and_of_a_plain_image_are_exact() -> None:
    for pixels in (photo()[::2, ::-1], np.zeros((64, 64, 3), np.uint8), photo()):
        with Image.open(io.BytesIO(encode_image(pixels, "png", 1))) as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert len(encode_image(photo(), "png", 95)) < photo().nbytes / 4


def test_png_is_fast() -> None:
    pixels = (photo(512) // 2 + noise(512, 512) // 16).astype(np.uint8)
    ours = min(cpu_seconds(lambda: encode_image(pixels, "png", 95)) for _ in range(3))
    pillows = cpu_seconds(lambda: file_of(Image.fromarray(pixels)))
    assert ours < pillows / 3


def cpu_seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def test_jpeg_keeps_full_colour_resolution() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, ::2] = (255, 0, 0)
    pixels[:, 1::2] = (0, 0, 255)  # vanishes under 4:2:0
    with Image.open(io.BytesIO(encode_image(pixels, "jpeg", 95))) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - pixels).max() < 20


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_quality_matters(image_format: ImageFormat) -> None:
    pixels = photo()
    pixels[::3, ::5] = 90
    low, high = (encode_image(pixels, image_format, quality) for quality in (10, 95))
    errors = []
    for data in (low, high):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == image_format.upper()
            errors.append(float(np.abs(np.asarray(image).astype(int) - pixels).mean()))
    assert len(low) < len(high)
    assert errors[0] > 1.4 * errors[1]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_equal_pixels_give_equal_bytes_in_any_thread(image_format: ImageFormat) -> None:
    several = [noise(32, 32) // (number + 1) for number in range(6)]
    once = [encode_image(pixels, image_format, 80) for pixels in several]
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda p: encode_image(p.copy(), image_format, 80), several * 4))
    assert again == once * 4


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(pixels: Array) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(height, width, 3\)"):
        encode_image(pixels, "png", 95)


def test_other_formats_are_refused() -> None:
    unknown: Any = "gif"
    with pytest.raises(ValueError, match="'gif'; allowed: png, jpeg, webp"):
        encode_image(noise(), unknown, 95)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("", []),
        (" \n\t ", []),
        ("😀 smile 🐈 cat", ["😀 smile U+1F408 cat"]),
        ("\u0939\u093f", ["U+0939 U+093F"]),  # a mark that the font lacks was drawn as a box
        ("e\u0301", ["e\u0301"]),
        ("❤️", ["❤"]),
    ],
)
def test_captions_show_what_the_font_has_and_code_points_else(text: str, lines: list[str]) -> None:
    assert caption_lines(text, 128) == lines


@pytest.mark.parametrize("text", ["W" * 1000, "قطة حمراء تجلس " * 90, "word " * 700_000, "図" * 50])
def test_captions_fit_and_long_prompts_cost_no_time(text: str) -> None:
    start = time.process_time()
    lines = caption_lines(text, 128)
    assert time.process_time() - start < 1
    assert len(lines) == 2 and lines[1].endswith("…")
    assert all(_font().getlength(line) <= 128 for line in lines)


def test_a_caption_reaches_into_no_neighbour() -> None:
    image = file_of(Image.new("RGB", (128, 128), "white"))
    towers = "Z" + "".join(map(chr, range(0x300, 0x340))) * 3
    sheets = [
        np.asarray(Image.open(io.BytesIO(contact_sheet([image] * 2, [text, ""]))))
        for text in (towers, "")
    ]
    changed = np.argwhere((sheets[0] != sheets[1]).any(axis=-1))  # (n, 2) rows and columns
    assert len(changed) and changed[:, 0].min() >= 8 + 128 and changed[:, 1].max() < 8 + 128


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_marked_file_says_that_a_model_made_it(image_format: ImageFormat) -> None:
    pixels = photo()
    plain, marked = (encode_image(pixels, image_format, 90, marked=one) for one in (False, True))
    assert 300 < len(marked) - len(plain) < 500
    with Image.open(io.BytesIO(marked)) as image, Image.open(io.BytesIO(plain)) as other:
        (described,) = image.getxmp()["xmpmeta"]["RDF"].values()
        assert described["DigitalSourceType"] == SOURCE_TYPE
        assert not other.getxmp()
        assert np.array_equal(np.asarray(image), np.asarray(other))
    assert encode_image(pixels.copy(), image_format, 90, marked=True) == marked
