"""Conditioning images in every form that datasets have are opened, fitted and derived."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter, ImageOps

from batchgen.errors import RejectRow
from batchgen.images.conditions import (
    MAKERS,
    Resize,
    describe,
    fit_image,
    fit_mask,
    make_condition,
    match_mask,
    settings_of,
    size_for,
    to_array,
)
from batchgen.images.source import MAX_PIXELS, open_image, open_mask
from tests.unit.test_images import Array, file_of, noise, photo

POLICIES: tuple[Resize, ...] = ("fill", "fit", "stretch", "multiple-of")


def decoded(data: object, width: int = 8, height: int = 8) -> Array:
    return to_array(fit_image(open_image(data), width, height, "fill"))


def rejected(data: object, what: str = "image") -> RejectRow:
    with pytest.raises(RejectRow) as caught:
        (open_mask if what == "mask" else open_image)(data)
    assert caught.value.message == str(caught.value)
    return caught.value


# --- files ---------------------------------------------------------------------------------------


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
    got = decoded(wrap(file_of(Image.fromarray(pixels))))
    assert (got.dtype, got.shape) == (np.uint8, (8, 8, 3))
    assert np.array_equal(got, pixels)
    got[0, 0] = 0  # writable, of its own


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_common_formats_are_read(image_format: str) -> None:
    pixels = photo()
    options = {"lossless": True} if image_format == "WEBP" else {}
    got = decoded(file_of(Image.fromarray(pixels), image_format, **options), 64, 64)
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
        ("cat.png", "undecodable-image", "type str; needed: image bytes"),
        (7, "undecodable-image", "type int"),
        (
            b"not an image",
            "undecodable-image",
            "UnidentifiedImageError: cannot identify image file)",
        ),
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
            assert decoded(bytes(damaged)).shape == (8, 8, 3)
        except RejectRow as error:
            reasons.add(error.reason)
    assert reasons <= {"undecodable-image", "unsupported-image", "image-too-large"}
    assert "undecodable-image" in reasons


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with almost no data."""

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
    assert str(MAX_PIXELS) in error.message
    assert time.process_time() - start < 1


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bombs_are_rejected_where_warnings_are_errors() -> None:
    assert rejected(png_of_size(12000, 9000)).reason == "image-too-large"


@pytest.mark.parametrize(("width", "height"), [(0, 8), (8, 0)])
def test_images_without_pixels_are_rejected(width: int, height: int) -> None:
    assert rejected(png_of_size(width, height)).reason == "undecodable-image"
    assert rejected(b"P6\n%d %d\n255\n" % (width, height)).reason == "undecodable-image"


# --- modes ---------------------------------------------------------------------------------------


def test_grey_and_one_bit_images_become_rgb() -> None:
    grey = noise(channels=1)
    got = decoded(file_of(Image.fromarray(grey)))
    assert np.array_equal(got, np.repeat(grey[..., None], 3, axis=2))
    bits = Image.fromarray(grey).convert("1")
    got = decoded(file_of(bits))
    assert set(np.unique(got)) == {0, 255}
    assert np.array_equal(got[..., 0], np.asarray(bits.convert("L")))


def test_transparency_lies_over_white() -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[:4, :, 3] = 255
    pixels[6:, :, 3] = 51  # a fifth
    got = decoded(file_of(Image.fromarray(pixels)))
    assert got[0, 0].tolist() == [200, 0, 0]
    assert got[5, 0].tolist() == [255, 255, 255]
    assert got[7, 0].tolist() == [244, 204, 204]


def test_grey_with_alpha_lies_over_white() -> None:
    pixels = np.zeros((8, 8, 2), dtype=np.uint8)
    pixels[:4, :, 1] = 255
    got = decoded(file_of(Image.fromarray(pixels, "LA")))
    assert got[0, 0].tolist() == [0, 0, 0]
    assert got[7, 7].tolist() == [255, 255, 255]


def test_palettes_are_resolved_with_their_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(0, (0, 0, 8, 4))
    opaque = decoded(file_of(palette))
    assert opaque[0, 0].tolist() == [10, 20, 30]
    assert opaque[7, 0].tolist() == [200, 100, 50]
    clear = decoded(file_of(palette, transparency=0))
    assert clear[0, 0].tolist() == [255, 255, 255]
    assert clear[7, 0].tolist() == [200, 100, 50]


def test_a_transparent_colour_of_an_rgb_png_lies_over_white() -> None:
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    got = decoded(file_of(image, transparency=(9, 9, 9)))
    assert got[0, 0].tolist() == [255, 255, 255]


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for image_format in ("TIFF", "JPEG"):
        got = decoded(file_of(image, image_format))
        red, green, blue = got[4, 4].tolist()
        assert red > 245
        assert max(green, blue) < 10


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    levels[7, 7] = 65535
    for image_format in ("PNG", "TIFF"):
        got = decoded(file_of(Image.fromarray(levels), image_format))
        assert np.array_equal(got[..., 0], np.round(levels / 257).astype(np.uint8))
        assert np.array_equal(got[..., 0], got[..., 2])
    big_endian = file_of(Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(decoded(big_endian), got)


def test_32_bit_grey_within_16_bits_is_scaled_and_beyond_is_rejected() -> None:
    levels = np.full((8, 8), 65535, dtype=np.int32)
    assert (decoded(file_of(Image.fromarray(levels), "TIFF")) == 255).all()
    for wrong in (-1, 70000):
        levels[0, 0] = wrong
        error = rejected(file_of(Image.fromarray(levels), "TIFF"))
        assert error.reason == "unsupported-image"
        assert str(wrong) in error.message


def test_floats_are_rejected() -> None:
    error = rejected(file_of(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"))
    assert error.reason == "unsupported-image"
    assert "floating-point pixels" in error.message


def test_lab_is_converted() -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    muted = photo(8) // 3 + 80
    lab = ImageCms.applyTransform(Image.fromarray(muted), to_lab)
    assert lab is not None
    got = decoded(file_of(lab, "TIFF"))
    assert np.abs(got.astype(int) - muted).max() <= 3


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


# --- shape ---------------------------------------------------------------------------------------


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
    assert np.array_equal(decoded(data), upright)


def test_a_rotated_photo_is_cropped_after_it_is_turned() -> None:
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees: 8 wide, 16 high, white on top
    got = decoded(file_of(Image.fromarray(wide), exif=exif), 8, 16)
    assert got.shape == (16, 8, 3)
    assert (got[:4] == 255).all()
    assert not got[4:].any()


def test_the_middle_is_kept_when_the_aspect_differs() -> None:
    columns = np.zeros((8, 24, 3), dtype=np.uint8)
    columns[:, 8:16] = (10, 200, 30)
    got = decoded(file_of(Image.fromarray(columns)))
    assert (got == (10, 200, 30)).all()
    rows = np.ascontiguousarray(columns.transpose(1, 0, 2))
    assert (decoded(file_of(Image.fromarray(rows))) == (10, 200, 30)).all()


@pytest.mark.parametrize(("width", "height"), [(16, 16), (8, 24), (40, 8), (64, 48)])
def test_the_wanted_size_is_met_by_lanczos(width: int, height: int) -> None:
    pixels = photo(96)[:, :64]
    got = decoded(file_of(Image.fromarray(pixels)), width, height)
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
        assert (decoded(file_of(image), 16, 8) == (1, 2, 3)).all()


# --- masks ---------------------------------------------------------------------------------------


def levels_of(image: Image.Image, image_format: str = "PNG", **options: Any) -> Array:
    mask = open_mask(file_of(image, image_format, **options))
    assert mask.mode == "L"
    return np.asarray(mask)  # (height, width)


def test_grey_masks_keep_their_levels_and_bits_are_black_and_white() -> None:
    grey = noise(channels=1)
    assert np.array_equal(levels_of(Image.fromarray(grey)), grey)
    bits = Image.fromarray(grey > 99)
    assert bits.mode == "1"
    assert np.array_equal(levels_of(bits), np.where(grey > 99, 255, 0))
    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(levels_of(Image.fromarray(deep), "TIFF"), grey)


def test_colours_of_masks_count_by_their_luminance_not_their_number() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 255, 255, 0, 0, 0])  # number 0 is white
    palette.paste(0, (0, 0, 8, 4))
    assert np.array_equal(levels_of(palette)[:, 0], [255] * 4 + [0] * 4)
    assert not levels_of(palette, transparency=0).any()
    assert (levels_of(Image.new("RGB", (8, 8), (0, 255, 0))) == 150).all()
    assert (levels_of(Image.new("RGB", (8, 8), (0, 0, 255))) == 29).all()


def test_what_is_transparent_in_a_mask_is_kept() -> None:
    pixels = np.full((8, 8, 4), 255, dtype=np.uint8)
    pixels[:2, :, 3] = 0
    pixels[2:4, :, 3] = 128
    assert levels_of(Image.fromarray(pixels))[:, 3].tolist() == [0, 0, 128, 128] + [255] * 4
    grey = Image.fromarray(np.ascontiguousarray(pixels[..., 2:]), "LA")
    assert levels_of(grey)[:, 3].tolist() == [0, 0, 128, 128] + [255] * 4
    white = Image.new("RGB", (8, 8), "white")
    assert not levels_of(white, transparency=(255, 255, 255)).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_like_its_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = noise(12, 8, channels=1)
    image = open_image(file_of(Image.fromarray(grey), exif=exif))
    mask = levels_of(Image.fromarray(grey), exif=exif)
    assert mask.shape == ((12, 8) if orientation >= 5 else (8, 12))
    assert np.array_equal(mask, to_array(image)[..., 0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "null-mask"),
        ({"bytes": None, "path": "a/mask.png"}, "null-mask"),
        (b"", "null-mask"),
        (7, "undecodable-mask"),
        (b"not an image", "undecodable-mask"),
        (png_of_size(8193, 8192), "mask-too-large"),
        (png_of_size(60000, 60000), "mask-too-large"),
        (file_of(Image.new("F", (8, 8)), "TIFF"), "unsupported-mask"),
        (file_of(Image.new("I", (8, 8), 70000), "TIFF"), "unsupported-mask"),
    ],
)
@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_what_is_no_mask_is_rejected(data: object, reason: str) -> None:
    error = rejected(data, "mask")
    assert error.reason == reason
    assert "allowed: " in error.message or "needed: " in error.message
    assert rejected(data).reason == reason.replace("mask", "image")
    assert rejected(data).message == error.message.replace("mask ", "image ")


def test_a_mask_of_the_same_shape_is_brought_to_its_images_size() -> None:
    image = Image.new("RGB", (101, 67))
    for size in ((50, 33), (51, 34), (202, 134), (10, 7)):
        assert match_mask(Image.new("L", size), image).size == (101, 67)
    same = Image.new("L", (101, 67))
    assert match_mask(same, image) is same
    for size in ((67, 101), (101, 101), (54, 33), (101, 69)):
        with pytest.raises(RejectRow, match=f"{size[0]} x {size[1]} pixels.* 101 x 67") as caught:
            match_mask(Image.new("L", size), image)
        assert caught.value.reason == "mask-size"
    small = np.zeros((16, 24), dtype=np.uint8)
    small[3:7, 5:11] = 255
    large = np.asarray(match_mask(Image.fromarray(small), Image.new("RGB", (72, 48))))
    assert np.array_equal(large, small.repeat(3, axis=0).repeat(3, axis=1))


# --- fitting -------------------------------------------------------------------------------------


def marked(size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[Image.Image, ...]:
    """An image with a red block on blue, and the mask of the block."""
    image, mask = Image.new("RGB", size, "blue"), Image.new("L", size)
    image.paste((255, 0, 0), box)
    mask.paste(255, box)
    return image, mask


def where_it_goes(
    policy: Resize, source: tuple[int, int], wanted: tuple[int, int], box: tuple[int, int, int, int]
) -> Array:
    """By arithmetic alone: the edges (left, top, right, bottom) of a block once it is fitted.

    In the size's frame: what is cropped away lies on its border.
    """
    given, size = np.array(source, dtype=float), np.array(wanted, dtype=float)
    scale = {
        "fill": np.full(2, (size / given).max()),
        "fit": np.full(2, (size / given).min()),
        "stretch": size / given,
        "multiple-of": np.ones(2),
    }[policy]
    moved = np.array(box).reshape(2, 2) * scale + (size - given * scale) / 2
    return np.clip(moved, 0, size).reshape(4)


def edges_of(block: Array) -> Array:
    rows, columns = np.flatnonzero(block.any(axis=1)), np.flatnonzero(block.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("source", [(90, 131), (131, 90), (96, 96), (80, 160)])
@pytest.mark.parametrize("wanted", [(64, 64), (48, 88), (88, 48), (80, 80)])
def test_image_and_mask_stay_registered(
    policy: Resize, source: tuple[int, int], wanted: tuple[int, int]
) -> None:
    (wide, high) = source
    box = (wide * 2 // 5, high * 3 // 7, wide * 5 // 7, high * 4 // 7)  # a few crops cut into it
    if policy == "multiple-of":
        wanted = (min(source[0], wanted[0]), min(source[1], wanted[1]))
    image, mask = marked(source, box)
    pixels = to_array(fit_image(image, *wanted, policy))
    repaint = fit_mask(mask, *wanted, policy)
    assert (repaint.dtype, repaint.shape) == (np.uint8, (wanted[1], wanted[0]))
    assert set(np.unique(repaint)) == {0, 255}
    red = pixels[..., 0] >= 128
    goal = where_it_goes(policy, source, wanted, box)
    assert np.abs(edges_of(red) - goal).max() <= 1
    assert np.abs(edges_of(repaint) - goal).max() <= 1.5  # box filters take whole pixels
    assert (red != (repaint == 255)).mean() < 0.01  # a filter's whim at the edges


@pytest.mark.parametrize("policy", ["fill", "fit", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (256, 256)])
def test_image_and_mask_are_registered_to_the_pixel_at_whole_scales(
    policy: Resize, size: tuple[int, int]
) -> None:
    image, mask = marked((128, 128), (20, 40, 90, 60))
    red = to_array(fit_image(image, *size, policy))[..., 0] >= 128
    assert np.array_equal(red, fit_mask(mask, *size, policy) == 255)


@pytest.mark.parametrize("wanted", [(16, 16), (8, 24), (40, 8), (64, 48)])
def test_fill_gives_the_bytes_of_pillows_fit(wanted: tuple[int, int]) -> None:
    for source in ((40, 64), (64, 40), (33, 33), wanted):
        image = Image.fromarray(noise(*source))
        expected = ImageOps.fit(image, wanted, method=Image.Resampling.LANCZOS)
        assert fit_image(image, *wanted, "fill").tobytes() == expected.tobytes()


def test_fit_pads_with_black_that_is_kept() -> None:
    white, mask = Image.new("RGB", (40, 20), "white"), Image.new("L", (40, 20), 255)
    wide = to_array(fit_image(white, 16, 16, "fit"))
    assert (wide[4:12] == 255).all()
    assert not wide[:4].any()
    assert not wide[12:].any()
    assert np.array_equal(fit_mask(mask, 16, 16, "fit"), wide[..., 0])
    high = to_array(fit_image(white.rotate(90, expand=True), 16, 16, "fit"))
    assert np.array_equal(high, wide.transpose(1, 0, 2))
    photograph = Image.fromarray(noise(40, 20))
    inner = photograph.resize((16, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(to_array(fit_image(photograph, 16, 16, "fit"))[4:12], np.asarray(inner))


def test_fit_of_thin_strips_leaves_a_pixel() -> None:
    strip = Image.new("RGB", (5000, 1), "white")
    assert (to_array(fit_image(strip, 16, 8, "fit")) == 255).all(axis=2).sum() == 16
    assert (to_array(fit_image(strip.rotate(90, expand=True), 16, 8, "fit")) == 255).sum() == 24


def test_stretch_regards_no_aspect() -> None:
    image = Image.fromarray(noise(40, 20))
    expected = image.resize((16, 24), Image.Resampling.LANCZOS)
    assert fit_image(image, 16, 24, "stretch").tobytes() == expected.tobytes()


def test_multiple_of_cuts_and_never_resamples() -> None:
    pixels, levels = noise(45, 21), noise(45, 21, channels=1)
    image, mask = Image.fromarray(pixels), Image.fromarray(levels)
    assert size_for(image, 8) == (40, 16)
    assert np.array_equal(to_array(fit_image(image, 40, 16, "multiple-of")), pixels[2:18, 2:42])
    cut = np.where(levels[2:18, 2:42] >= 128, 255, 0)
    assert np.array_equal(fit_mask(mask, 40, 16, "multiple-of"), cut)
    assert np.array_equal(to_array(fit_image(image, 45, 21, "multiple-of")), pixels)
    for width, height in ((46, 21), (45, 22)):
        with pytest.raises(RejectRow, match=f"45 x 21 pixels.*at least {width} x") as caught:
            fit_image(image, width, height, "multiple-of")
        assert caught.value.reason == "image-too-small"
        with pytest.raises(RejectRow) as caught:
            fit_mask(mask, width, height, "multiple-of")
        assert caught.value.reason == "mask-too-small"


@pytest.mark.parametrize(
    ("source", "multiple_of", "upscale", "expected"),
    [
        ((64, 64), 64, 1, (64, 64)),
        ((127, 200), 64, 1, (64, 192)),
        ((127, 201), 1, 1, (127, 201)),
        ((127, 201), 32, 4, (120, 200)),  # 480 x 800
        ((127, 201), 4, 4, (127, 201)),
        ((127, 201), 8, 3, (120, 200)),
        ((127, 201), 12, 8, (126, 201)),
    ],
)
def test_the_size_to_be_made_is_a_multiple(
    source: tuple[int, int], multiple_of: int, upscale: int, expected: tuple[int, int]
) -> None:
    image = Image.new("RGB", source)
    size = size_for(image, multiple_of, upscale)
    assert size == expected
    assert all(side * upscale % multiple_of == 0 for side in size)
    assert fit_image(image, *size, "multiple-of").size == size


@pytest.mark.parametrize("source", [(63, 200), (200, 63)])
def test_images_under_one_multiple_are_rejected(source: tuple[int, int]) -> None:
    with pytest.raises(RejectRow, match="at least 64 x 64") as caught:
        size_for(Image.new("RGB", source), 64)
    assert caught.value.reason == "image-too-small"
    assert size_for(Image.new("RGB", source), 64, 4)


def test_a_masks_pixel_is_white_where_half_of_it_is() -> None:
    levels = np.zeros((4, 8), dtype=np.uint8)
    levels[0, 0] = 255  # a quarter
    levels[:2, 2] = 255  # a half
    levels[:2, 4:6] = 255
    assert fit_mask(Image.fromarray(levels), 4, 2, "fill").tolist() == [[0, 255, 255, 0], [0] * 4]
    assert (fit_mask(Image.new("L", (8, 8), 128), 8, 8, "stretch") == 255).all()


def test_masks_without_white_are_rejected() -> None:
    _, beside = marked((64, 16), (0, 0, 8, 16))  # cut away by fill, not by the others
    assert fit_mask(beside, 16, 16, "fit").any()
    for mask, level in ((Image.new("L", (8, 8), 127), 127), (Image.new("L", (8, 8), 1), 1)):
        with pytest.raises(
            RejectRow, match=rf"\(128 needed\); before resizing it was {level}"
        ) as caught:
            fit_mask(mask, 16, 16, "fill")
        assert caught.value.reason == "empty-mask"
    with pytest.raises(RejectRow, match=r"to 16 x 16 its brightest pixel is 0 .* it was 255"):
        fit_mask(beside, 16, 16, "fill")


def test_arrays_are_contiguous_and_their_own() -> None:
    pixels = noise(5, 3)
    array = to_array(Image.fromarray(pixels))
    assert (array.dtype, array.shape) == (np.uint8, (3, 5, 3))
    assert array.flags.c_contiguous
    assert array.flags.owndata
    array[...] = 0
    assert pixels.any()


# --- makers --------------------------------------------------------------------------------------


def drawing() -> Image.Image:
    """Smooth colours with sharp forms on them, of odd size."""
    image = Image.fromarray(photo(77)).crop((0, 0, 77, 61))
    image.paste((250, 240, 20), (10, 12, 40, 30))
    image.paste((5, 10, 90), (45, 20, 48, 60))
    return image


def made(name: str, image: Image.Image | None = None, **options: float) -> Array:
    condition = make_condition(name, options, image or drawing())
    assert condition.mode == "RGB"
    return to_array(condition)


def test_canny_is_opencvs_on_any_number_of_threads() -> None:
    import cv2

    rough = Image.fromarray(noise(64, 48)).resize((128, 96), Image.Resampling.BICUBIC)
    pixels = to_array(rough)
    threads = cv2.getNumThreads()
    try:
        for number in (1, 4):
            cv2.setNumThreads(number)
            edges = made("canny", rough, low=50, high=120)
            assert np.array_equal(edges, np.repeat(cv2.Canny(pixels, 50, 120)[..., None], 3, 2))
            assert cv2.getNumThreads() == number
    finally:
        cv2.setNumThreads(threads)
    edges = made("canny")
    assert set(np.unique(edges)) == {0, 255}
    assert edges[15:28, 8:12, 0].any(axis=1).all()  # the left side of the yellow block
    assert not edges[15:28, 20:30].any()  # its inside
    assert np.array_equal(made("canny"), made("canny", low=100, high=200))
    assert (made("canny", low=1020, high=1020) != made("canny")).any()


def test_scribble_draws_dark_lines_white() -> None:
    paper = Image.new("RGB", (64, 64), "white")
    paper.paste((20, 20, 60), (10, 30, 54, 33))
    lines = made("scribble", paper)
    assert set(np.unique(lines)) == {0, 255}
    assert (lines[30:33, 12:52] == 255).all()
    assert not lines[:27].any()
    assert not lines[36:].any()
    assert not made("scribble", ImageOps.invert(paper))[30:33].any()
    faint = Image.eval(paper, lambda level: 245 + level // 25)
    assert not made("scribble", faint).any()
    assert made("scribble", faint, level=4).any()


def test_grey_invert_and_blur_are_pillows() -> None:
    image = drawing()
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(made("grey"), np.stack([grey] * 3, axis=2))
    assert np.array_equal(made("invert"), 255 - to_array(image))
    assert np.array_equal(made("blur"), np.asarray(image.filter(ImageFilter.GaussianBlur(4.0))))
    assert made("blur", radius=9).std() < made("blur", radius=0.5).std()


def test_downscale_takes_means_and_tile_enlarges_them_again() -> None:
    image = Image.fromarray(noise(32, 16))
    means = np.round(noise(32, 16).reshape(4, 4, 8, 4, 3).mean(axis=(1, 3)) + 1e-6)
    small = made("downscale", image)
    assert np.abs(small - means).max() <= 1
    assert np.array_equal(small, np.asarray(image.resize((8, 4), Image.Resampling.BOX)))
    again = Image.fromarray(small).resize((32, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(made("tile", image, factor=4), np.asarray(again))
    assert made("downscale", factor=2).shape == (30, 38, 3)
    assert made("downscale", Image.new("RGB", (3, 500)), factor=64).shape == (8, 1, 3)


@pytest.mark.parametrize("name", MAKERS)
def test_makers_repeat_themselves_keep_the_size_and_leave_the_image_alone(name: str) -> None:
    image = drawing()
    first = make_condition(name, {}, image)
    assert image.tobytes() == drawing().tobytes()
    assert make_condition(name, {}, drawing()).tobytes() == first.tobytes()
    assert first.size == ((19, 15) if name == "downscale" else image.size)
    assert made(name, Image.new("RGB", (1, 1), "red")).shape == (1, 1, 3)
    maker = MAKERS[name]
    assert maker.name == name
    assert maker.about
    for option, bounds in maker.options.items():
        settings_of(name, {option: bounds.default}, MAKERS)
        assert bounds.low <= bounds.default <= bounds.high


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cany", {}, r"got 'cany'; allowed: canny, scribble, .*; did you mean 'canny'\?"),
        ("depth", {}, r"got 'depth'; allowed: canny, scribble, invert, grey, .*blur$"),
        ("canny", {"lo": 1}, r"canny: got 'lo'; allowed: low, high; did you mean 'low'\?"),
        ("grey", {"level": 1}, "grey: got 'level'; allowed: no options$"),
        ("canny", {"low": -1}, "canny.low: got -1; allowed: a whole number from 0 to 1020"),
        ("canny", {"low": 1.5}, "canny.low: got 1.5; allowed: a whole number"),
        ("canny", {"low": True}, "canny.low: got True; allowed: a whole"),
        ("canny", {"low": "7"}, "canny.low: got '7'; allowed: a whole"),
        ("canny", {"low": None}, "canny.low: got None; allowed: a whole"),
        ("canny", {"low": float("nan")}, "canny.low: got nan"),
        ("canny", {"low": 250}, "canny.low: got 250; allowed: at most high .200."),
        ("tile", {"factor": 1}, "tile.factor: got 1; allowed: a whole number from 2 to 64"),
        ("blur", {"radius": float("inf")}, "blur.radius: got inf; allowed: a number from 0.1 to"),
        ("blur", {"radius": 10**400}, "blur.radius: got 10"),
    ],
)
def test_wrong_makers_and_options_are_refused(name: str, options: Any, message: str) -> None:
    for use in (
        lambda *both: settings_of(*both, MAKERS),
        lambda *both: describe(*both, MAKERS),
        lambda *both: make_condition(*both, drawing()),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            use(name, options)


def test_makers_are_described_with_all_their_options() -> None:
    assert describe("canny", {}, MAKERS) == "canny(high=200, low=100)"
    assert describe("canny", {"low": 50.0}, MAKERS) == "canny(high=200, low=50)"
    assert describe("blur", {"radius": 3}, MAKERS) == "blur(radius=3.0)"
    assert describe("grey", {}, MAKERS) == "grey()"


def test_the_table_of_makers_is_frozen() -> None:
    table: Any = MAKERS
    with pytest.raises(TypeError):
        table["other"] = MAKERS["grey"]


def test_opencv_is_loaded_for_its_users_alone() -> None:
    code = "import sys, batchgen.images.conditions; "
    code += "print({'cv2', 'torch', 'pyarrow'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
