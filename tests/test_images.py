"""Images in every form that data sets hold, and files that any reader opens."""

from __future__ import annotations

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from batchgen import images
from batchgen.errors import RejectRow
from batchgen.images import ImageFormat, decode_condition, encode_image

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


def rejected(data: object) -> RejectRow:
    with pytest.raises(RejectRow) as caught:
        decode_condition(data, 8, 8)
    assert caught.value.message == str(caught.value)
    return caught.value


# --- decode: forms of bytes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        bytearray,
        memoryview,
        lambda data: {"bytes": data, "path": None},
        lambda data: {"bytes": data, "path": "cat.png"},
        lambda data: {"bytes": data},
    ],
)
def test_bytes_and_structs_are_read(wrap: Any) -> None:
    pixels = noise()
    got = decode_condition(wrap(file_of(Image.fromarray(pixels))), 8, 8)
    assert (got.dtype, got.shape) == (np.uint8, (8, 8, 3))
    assert np.array_equal(got, pixels)
    got[0, 0] = 0  # writable, of its own


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_common_formats_are_read(image_format: str) -> None:
    pixels = photo()
    options = {"lossless": True} if image_format == "WEBP" else {}
    got = decode_condition(file_of(Image.fromarray(pixels), image_format, **options), 64, 64)
    allowed = {"GIF": 40, "JPEG": 12}.get(image_format, 0)
    assert np.abs(got.astype(int) - pixels).max() <= allowed


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (None, "null-image", "image is null"),
        (b"", "null-image", "zero bytes"),
        ({"bytes": None, "path": None}, "null-image", "image is null"),
        ({"bytes": None, "path": "a/cat.png"}, "null-image", "path 'a/cat.png' but no bytes"),
        ({}, "null-image", "image is null"),
        ("cat.png", "undecodable-image", "type str; allowed: image bytes"),
        (7, "undecodable-image", "type int"),
        (b"not an image", "undecodable-image", "UnidentifiedImageError"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "undecodable-image", "allowed:"),
    ],
)
def test_what_is_no_image_is_rejected(data: object, reason: str, words: str) -> None:
    error = rejected(data)
    assert error.reason == reason
    assert words in error.message


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_are_rejected_or_read_but_never_crash(image_format: str) -> None:
    whole = file_of(Image.fromarray(noise(32, 32)), image_format)
    random = np.random.default_rng(1)
    assert rejected(whole[: len(whole) // 2]).reason == "undecodable-image"
    reasons = set()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 200), 6):
            damaged[place] = random.integers(0, 256)
        try:
            assert decode_condition(bytes(damaged), 8, 8).shape == (8, 8, 3)
        except RejectRow as error:
            reasons.add(error.reason)
    assert reasons <= {"undecodable-image", "unsupported-image", "image-too-large"}
    assert "undecodable-image" in reasons


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (60000, 60000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_bombs_are_rejected_before_they_are_decoded(width: int, height: int) -> None:
    start = time.process_time()
    error = rejected(png_of_size(width, height))
    assert error.reason == "image-too-large"
    assert str(images.MAX_PIXELS) in error.message
    assert time.process_time() - start < 1


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bombs_are_rejected_where_warnings_are_errors() -> None:
    assert rejected(png_of_size(12000, 9000)).reason == "image-too-large"


@pytest.mark.parametrize(("width", "height"), [(0, 8), (8, 0)])
def test_images_without_pixels_are_rejected(width: int, height: int) -> None:
    assert rejected(png_of_size(width, height)).reason == "undecodable-image"
    assert rejected(b"P6\n%d %d\n255\n" % (width, height)).reason == "undecodable-image"


# --- decode: modes -------------------------------------------------------------------------------


def test_grey_and_one_bit_images_become_rgb() -> None:
    grey = noise(channels=1)
    got = decode_condition(file_of(Image.fromarray(grey)), 8, 8)
    assert np.array_equal(got, np.repeat(grey[..., None], 3, axis=2))
    bits = Image.fromarray(grey).convert("1")
    got = decode_condition(file_of(bits), 8, 8)
    assert set(np.unique(got)) == {0, 255}
    assert np.array_equal(got[..., 0], np.asarray(bits.convert("L")))


def test_transparency_lies_over_white() -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[:4, :, 3] = 255
    pixels[6:, :, 3] = 51  # a fifth
    got = decode_condition(file_of(Image.fromarray(pixels)), 8, 8)
    assert got[0, 0].tolist() == [200, 0, 0]
    assert got[5, 0].tolist() == [255, 255, 255]
    assert got[7, 0].tolist() == [244, 204, 204]


def test_grey_with_alpha_lies_over_white() -> None:
    pixels = np.zeros((8, 8, 2), dtype=np.uint8)
    pixels[:4, :, 1] = 255
    got = decode_condition(file_of(Image.fromarray(pixels, "LA")), 8, 8)
    assert got[0, 0].tolist() == [0, 0, 0]
    assert got[7, 7].tolist() == [255, 255, 255]


def test_palettes_are_resolved_with_their_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(0, (0, 0, 8, 4))
    opaque = decode_condition(file_of(palette), 8, 8)
    assert opaque[0, 0].tolist() == [10, 20, 30]
    assert opaque[7, 0].tolist() == [200, 100, 50]
    clear = decode_condition(file_of(palette, transparency=0), 8, 8)
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert clear[7, 0].tolist() == [200, 100, 50]


def test_a_transparent_colour_of_an_rgb_png_lies_over_white() -> None:
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    got = decode_condition(file_of(image, transparency=(9, 9, 9)), 8, 8)
    assert got[0, 0].tolist() == [255, 255, 255]


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for image_format in ("TIFF", "JPEG"):
        got = decode_condition(file_of(image, image_format), 8, 8)
        red, green, blue = got[4, 4].tolist()
        assert red > 245
        assert max(green, blue) < 10


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    levels[7, 7] = 65535
    for image_format in ("PNG", "TIFF"):
        got = decode_condition(file_of(Image.fromarray(levels), image_format), 8, 8)
        assert np.array_equal(got[..., 0], np.round(levels / 257).astype(np.uint8))
        assert np.array_equal(got[..., 0], got[..., 2])
    big_endian = file_of(Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(decode_condition(big_endian, 8, 8), got)


def test_32_bit_grey_within_16_bits_is_scaled_and_beyond_is_rejected() -> None:
    levels = np.full((8, 8), 65535, dtype=np.int32)
    assert (decode_condition(file_of(Image.fromarray(levels), "TIFF"), 8, 8) == 255).all()
    for wrong in (-1, 70000):
        levels[0, 0] = wrong
        error = rejected(file_of(Image.fromarray(levels), "TIFF"))
        assert error.reason == "unsupported-image"
        assert str(wrong) in error.message


def test_floats_are_rejected() -> None:
    error = rejected(file_of(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"))
    assert error.reason == "unsupported-image"
    assert "floats" in error.message


def test_lab_is_converted() -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    muted = photo(8) // 3 + 80
    lab = ImageCms.applyTransform(Image.fromarray(muted), to_lab)
    assert lab is not None
    got = decode_condition(file_of(lab, "TIFF"), 8, 8)
    assert np.abs(got.astype(int) - muted).max() <= 3


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_condition(data, 8, 8)[0, 0].tolist() == [255, 0, 0]


# --- decode: shape -------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(8, 8)
    # The stored pixels, for each orientation, of an image that should look like `upright`.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(decode_condition(data, 8, 8), upright)


def test_a_rotated_photo_is_cropped_after_it_is_turned() -> None:
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees: 8 wide, 16 high, white on top
    got = decode_condition(file_of(Image.fromarray(wide), exif=exif), 8, 16)
    assert got.shape == (16, 8, 3)
    assert (got[:4] == 255).all()
    assert not got[4:].any()


def test_the_middle_is_kept_when_the_aspect_differs() -> None:
    columns = np.zeros((8, 24, 3), dtype=np.uint8)
    columns[:, 8:16] = (10, 200, 30)
    got = decode_condition(file_of(Image.fromarray(columns)), 8, 8)
    assert (got == (10, 200, 30)).all()
    rows = np.ascontiguousarray(columns.transpose(1, 0, 2))
    assert (decode_condition(file_of(Image.fromarray(rows)), 8, 8) == (10, 200, 30)).all()


@pytest.mark.parametrize(("width", "height"), [(16, 16), (8, 24), (40, 8), (64, 48)])
def test_the_wanted_size_is_met_by_lanczos(width: int, height: int) -> None:
    pixels = photo(96)[:, :64]
    got = decode_condition(file_of(Image.fromarray(pixels)), width, height)
    assert got.shape == (height, width, 3)
    scale = max(width / 64, height / 96)
    left, top = (64 - width / scale) / 2, (96 - height / scale) / 2
    expected = Image.fromarray(pixels).resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, 64 - left, 96 - top)
    )
    assert np.abs(got.astype(int) - np.asarray(expected)).max() <= 1


def test_single_pixels_and_thin_strips_are_read() -> None:
    for width, height in ((1, 1), (1, 5000), (5000, 1)):
        image = Image.new("RGB", (width, height), (1, 2, 3))
        assert (decode_condition(file_of(image), 16, 8) == (1, 2, 3)).all()


# --- encode --------------------------------------------------------------------------------------


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
