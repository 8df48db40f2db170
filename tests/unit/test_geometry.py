"""Labels follow the pixels: through every policy, size, orientation and enlargement."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from batchgen.images.conditions import Resize, fit_image, size_for
from batchgen.images.geometry import (
    Affine,
    Box,
    Size,
    fit_map,
    orientation_map,
    orientation_of,
    scaling,
)
from batchgen.labels.move import Move, cut_polygon, polygon_area
from batchgen.labels.objects import LabelObject
from batchgen.labels.rle import decoded, drawn, encoded

POLICIES: tuple[Resize, ...] = ("fill", "fit", "stretch", "multiple-of")
SIDE = st.integers(16, 200)
ORIENTATION = 0x0112


def target_of(source: Size, wanted: Size, policy: Resize) -> Size:
    """The size that a policy brings an image to."""
    return size_for(Image.new("L", source), 8) if policy == "multiple-of" else wanted


def whole_move(
    source: Size, wanted: Size, policy: Resize, orientation: int = 1, upscale: int = 1
) -> Move:
    """Stored pixels -> upright -> fitted -> enlarged."""
    upright = source[::-1] if orientation >= 5 else source
    size = target_of(upright, wanted, policy)
    by = orientation_map(orientation, upright).then(fit_map(upright, size, policy))
    large = (size[0] * upscale, size[1] * upscale)
    return Move(by.then(scaling(size, large)), source, large)


def picture_of(
    pixels: np.ndarray[Any, Any], wanted: Size, policy: Resize, orientation: int = 1
) -> np.ndarray[Any, Any]:
    """The same, done to an image as the stream does it."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    assert orientation_of(file.getvalue()) == orientation
    image = ImageOps.exif_transpose(Image.open(file))
    size = target_of(image.size, wanted, policy)
    return np.asarray(fit_image(image.convert("RGB"), *size, policy))[:, :, 0]


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(SIDE, SIDE),
    st.tuples(SIDE, SIDE),
    st.sampled_from(POLICIES),
    st.integers(1, 8),
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9),
)
def test_a_map_and_its_inverse_agree_within_a_pixel(
    source: Size,
    wanted: Size,
    policy: Resize,
    orientation: int,
    upscale: int,
    shares: list[tuple[float, float]],
) -> None:
    move = whole_move(source, wanted, policy, orientation, upscale)
    points = np.array(shares) * source
    there = move.by.points(points)
    assert np.abs(move.by.inverse().points(there) - points).max() < 1e-6
    corner = move.by.points(np.array([(0.0, 0.0), source]))
    covered = np.abs(corner[1] - corner[0])
    if policy == "stretch":
        assert np.allclose(covered, move.target)
    elif policy == "fill":
        assert (covered >= np.array(move.target) - 1e-6).all()
    elif policy == "fit":
        assert (covered <= np.array(move.target) + 1e-6).all()


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(40, 160), st.integers(40, 160)),
    st.tuples(st.integers(40, 160), st.integers(40, 160)),
    st.sampled_from(POLICIES),
    st.integers(1, 8),
    st.data(),
)
def test_the_pixels_of_a_drawn_rectangle_lie_in_the_moved_box(
    source: Size, wanted: Size, policy: Resize, orientation: int, data: Any
) -> None:
    x = data.draw(st.integers(0, source[0] - 12))
    y = data.draw(st.integers(0, source[1] - 12))
    width = data.draw(st.integers(12, source[0] - x))
    height = data.draw(st.integers(12, source[1] - y))
    pixels = np.zeros((source[1], source[0]), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    shown = picture_of(pixels, wanted, policy, orientation) >= 128
    move = whole_move(source, wanted, policy, orientation)
    assert shown.shape == (move.target[1], move.target[0])
    moved, share = move.object(LabelObject((x, y, width, height), 0))
    rows, columns = np.nonzero(shown)
    if moved is None or min(moved.box[2:]) < 2:
        assert len(rows) <= 2 * max(move.target)
        return
    left, top, across, down = moved.box
    assert 0 < share <= 1 + 1e-9
    assert columns.min() >= left - 1 and columns.max() + 1 <= left + across + 1
    assert rows.min() >= top - 1 and rows.max() + 1 <= top + down + 1
    # and they fill it: the box is tight
    assert columns.min() <= left + 1 and columns.max() + 1 >= left + across - 1
    assert rows.min() <= top + 1 and rows.max() + 1 >= top + down - 1


def iou(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> float:
    union = np.logical_or(one, two).sum()
    return float(np.logical_and(one, two).sum() / union) if union else 1.0


POLYGON = (20.0, 15.0, 118.0, 22.0, 90.0, 55.0, 121.0, 92.0, 30.0, 95.0, 52.0, 50.0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("wanted", [(128, 96), (96, 128), (200, 120)])
def test_polygons_masks_and_keypoints_agree_with_the_moved_image(
    policy: Resize, orientation: int, wanted: Size
) -> None:
    source = (130, 101)
    pixels = drawn([POLYGON], source)
    shown = picture_of(pixels.astype(np.uint8) * 255, wanted, policy, orientation) >= 128
    move = whole_move(source, wanted, policy, orientation)
    one = LabelObject(
        (20, 15, 101, 80), 0, (POLYGON,), keypoints=((90.5, 40.5, 2), (60.5, 70.5, 1))
    )
    moved, _ = move.object(one)
    assert moved is not None
    assert iou(drawn(moved.polygons, move.target), shown) > 0.95
    assert iou(move.mask(pixels), shown) > 0.95
    masked, _ = move.object(LabelObject(one.box, 0, rle=encoded(pixels)))
    assert masked is not None and masked.rle is not None
    assert iou(decoded(masked.rle), shown) > 0.95
    for (x, y, seen), before in zip(moved.keypoints, one.keypoints, strict=True):
        dot = np.zeros((source[1], source[0]), np.uint8)
        rows, columns = (
            slice(int(before[1]) - 2, int(before[1]) + 3),
            slice(int(before[0]) - 2, int(before[0]) + 3),
        )
        dot[rows, columns] = 255
        there = picture_of(dot, wanted, policy, orientation).astype(float)
        assert seen == before[2]
        middle = [
            float((np.arange(n) + 0.5) @ there.sum(axis=a) / there.sum())
            for a, n in ((0, there.shape[1]), (1, there.shape[0]))
        ]
        assert abs(x - middle[0]) < 1 and abs(y - middle[1]) < 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 150), st.floats(-50, 150)), min_size=3, max_size=8))
def test_a_cut_polygon_covers_what_lay_inside(points: list[tuple[float, float]]) -> None:
    size = (100, 80)
    cut = cut_polygon(points, size)
    assert all(-1e-9 <= x <= 100 + 1e-9 and -1e-9 <= y <= 80 + 1e-9 for x, y in cut)
    flat = tuple(value for point in cut for value in point)
    assert not cut or polygon_area(flat) <= 100 * 80 + 1e-6


def test_a_box_that_is_cut_says_how_much_is_left() -> None:
    move = Move(Affine(x0=-50.0), (100, 100), (50, 100))
    box: Box = (40, 10, 20, 20)
    moved, share = move.object(LabelObject(box, 3, area=400.0))
    assert moved is not None and moved.box == (0.0, 10.0, 10.0, 20.0)
    assert (share, moved.area, moved.category) == (0.5, 200.0, 3)
    assert move.object(LabelObject((0, 0, 50, 50), 0)) == (None, 0.0)


def test_a_keypoint_that_is_cut_away_is_no_longer_labelled() -> None:
    move = Move(Affine(x0=-50.0), (100, 100), (50, 100))
    points = ((20.0, 20.0, 2), (60.0, 30.0, 2), (0.0, 0.0, 0))
    moved, _ = move.object(LabelObject((10, 10, 80, 40), 0, keypoints=points))
    assert moved is not None and moved.keypoints == ((0, 0, 0), (10.0, 30.0, 2), (0, 0, 0))
