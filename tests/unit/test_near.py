"""Near copies: hashes by exact bands, pixels that are alike, and which of a group stays."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchgen.curate import near_hashes as near_hashes_module
from batchgen.curate.near import Matches, NearVectors, flipped, nearest_of, staying
from batchgen.curate.near_hashes import band_masks, nearest, pairs_within
from batchgen.curate.near_vectors import IndexedVectors
from batchgen.curate.prints import Prints
from batchgen.images.likeness import PLANES, coarse, likeness, mirrored, planes
from batchgen.images.perceptual_hash import CROPS, crop_hashes, distances, perceptual_hash
from tests.pictured_outputs import jpeg, textures

Array = np.ndarray[Any, Any]
HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=40)


@st.composite
def near_hashes(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """Two arrays of hashes, many of which differ in few bits."""
    roots = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=10, unique=True)
    some = []
    for _ in range(2):
        chosen = draw(st.lists(st.tuples(st.sampled_from(roots), flips), max_size=30))
        some.append([root ^ sum(1 << place for place in places) for root, places in chosen])
    first, second = (np.array(one, np.uint64) for one in some)
    return first, second, draw(st.integers(0, 16))


# Most pairs that are compared without bands; size of the runs that are compared in tiles.
WAYS = {"all": (1 << 21, 600), "expanded": (0, 1 << 40), "tiles": (0, 0)}


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(case=near_hashes())
def test_no_pair_within_the_bits_is_missed_and_each_comes_once(
    way: str, case: tuple[Array, Array, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_hashes_module, "_FEW", WAYS[way][0])
        patch.setattr(near_hashes_module, "_LARGE", WAYS[way][1])
        _compare(case)


def _compare(case: tuple[Array, Array, int]) -> None:
    first, second, bits = case
    found = [
        (int(one), int(other), int(count))
        for pairs in pairs_within(first, second, bits)
        for one, other, count in zip(*pairs, strict=True)
    ]
    expected = {
        (one, other, (int(first[one]) ^ int(second[other])).bit_count())
        for one in range(len(first))
        for other in range(len(second))
    }
    assert len(found) == len(set(found))
    assert set(found) == {pair for pair in expected if pair[2] <= bits}


@pytest.mark.parametrize("bits", range(17))
def test_the_bands_are_disjoint_and_cover_all_bits(bits: int) -> None:
    masks = [int(mask) for mask in band_masks(bits)]
    assert len(masks) == bits + 1
    assert sum(masks) == 2**64 - 1
    assert sum(mask.bit_count() for mask in masks) == 64


def test_many_hashes_in_one_band_are_compared_in_tiles() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 8, 5000, dtype=np.uint64)  # all the upper bits are equal
    found = sum(len(pairs.first) for pairs in pairs_within(hashes, hashes[:700], 0))
    counts = np.bincount(hashes.astype(int)), np.bincount(hashes[:700].astype(int))
    assert found == int((counts[0] * counts[1]).sum())


def test_the_least_distance_to_a_set() -> None:
    first, second = np.array([0, 7, 255], np.uint64), np.array([1, 3, 15], np.uint64)
    assert nearest(first, second).tolist() == [1, 1, 4]


def test_the_first_crop_is_the_image_and_the_others_find_crops() -> None:
    for pixels in textures(20, side=96):
        hashes = crop_hashes(pixels)
        assert len(hashes) == len(CROPS)
        assert int(hashes[0]) == perceptual_hash(pixels)
        cropped = np.asarray(Image.fromarray(pixels).crop((3, 3, 93, 93)).resize((96, 96)))
        other = np.uint64(perceptual_hash(cropped))
        assert distances(hashes, other).min() <= 4


def test_a_copy_is_alike_whatever_its_brightness_format_and_small_crop() -> None:
    for pixels in textures(20, side=96):
        image = Image.fromarray(pixels)
        copies = [
            jpeg(pixels),
            (pixels * 0.8).astype(np.uint8),
            np.asarray(image.resize((40, 64))),
            np.asarray(image.crop((3, 3, 93, 93)).resize((96, 96))),
            np.asarray(image.crop((3, 3, 96, 96))),
            np.asarray(image.crop((0, 3, 93, 96))),
        ]
        one = np.stack([planes(pixels)] * len(copies))
        other = np.stack([planes(copy) for copy in copies])
        assert likeness(one, other).min() > 0.99
        assert np.allclose(likeness(one, other), likeness(other, one), atol=1e-5)
        assert (coarse(one) * coarse(other)).sum(axis=1).min() > 0.9


def test_different_images_and_images_of_one_colour_are_not_alike() -> None:
    images = np.stack([planes(pixels) for pixels in textures(40)])
    one, other = np.triu_indices(40, 1)
    assert likeness(images[one], images[other]).max() < 0.9
    flat = np.stack([planes(np.full((8, 8, 3), level, np.uint8)) for level in (0, 200)])
    assert likeness(flat[:1], flat[1:]).max() == 0
    assert coarse(flat).max() == 0


def test_mirrored_twice_is_the_image() -> None:
    images = np.stack([planes(pixels) for pixels in textures(3)])
    assert (mirrored(mirrored(images)) == images).all()
    turned = np.stack([planes(pixels[:, ::-1].copy()) for pixels in textures(3)])
    assert np.abs(mirrored(images).astype(int) - turned).max() <= 1


class Table:
    """Near pairs as a matrix says; ``asked`` counts the pairs that were looked at."""

    def __init__(self, near: Array) -> None:
        self.near = near

    def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
        row, column = np.nonzero(self.near[np.ix_(first, second)])
        none = np.zeros(len(row), np.uint8)
        likeness = self.near[first[row], second[column]].astype(np.float32)
        yield Matches(first[row], second[column], none, likeness)


@pytest.mark.parametrize("count", [1, 30, 1025, 3000])
def test_what_stays_is_what_one_by_one_would_keep(count: int) -> None:
    generator = np.random.default_rng(count)
    near = generator.random((count, count)) < 4 / count
    near |= near.T
    order = generator.permutation(count)
    kept: list[int] = []
    for place in order.tolist():
        if not near[place, kept].any():
            kept.append(place)
    assert staying(Table(near), order).tolist() == kept


def test_the_nearest_is_the_most_alike_then_the_earliest() -> None:
    near = np.zeros((5, 5))
    near[0, 3], near[1, 3], near[2, 3], near[2, 4] = 0.993, 0.999, 0.999, 0.995
    found = nearest_of(Table(near), np.array([2, 1, 0]), np.array([3, 4]), 5)
    assert found.place.tolist() == [-1, -1, -1, 2, 2]
    found = nearest_of(Table(near), np.array([0, 1, 2]), np.array([3, 4]), 5)
    assert found.place.tolist() == [-1, -1, -1, 1, 2]


def test_vectors_are_compared_in_blocks() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(70, 16)).astype(np.float32)
    vectors[60:] = vectors[:10] + 0.05 * generator.normal(size=(10, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = NearVectors(vectors, vectors, 0.97, block=16)
    every = np.arange(70)
    found = {
        (int(one), int(other))
        for part in near(every, every)
        for one, other in zip(part.first, part.second, strict=True)
    }
    assert found == {(int(a), int(b)) for a, b in np.argwhere(vectors @ vectors.T >= 0.97)}
    assert len(staying(near, every)) == 60


def test_hashes_are_those_of_imagehash() -> None:
    for side in (20, 32, 57, 200):
        for pixels in textures(10, seed=side, side=side):
            judged = int(str(imagehash.phash(Image.fromarray(pixels))), 16)
            assert perceptual_hash(pixels) == judged


def test_an_index_finds_what_the_exact_search_finds() -> None:
    pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(4000, 32)).astype(np.float32)
    vectors[3900:] = vectors[:100] + 0.02 * generator.normal(size=(100, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    every = np.arange(len(vectors))
    exact, indexed = (
        {
            (int(one), int(other))
            for part in near(every, every)
            for one, other in zip(part.first, part.second, strict=True)
        }
        for near in (
            NearVectors(vectors, vectors, 0.95),
            IndexedVectors(vectors, vectors, 0.95, fewest=100),
        )
    )
    assert len(exact) >= 4000 + 200
    assert indexed <= exact
    assert len(indexed) >= 0.99 * len(exact)


def test_mirrored_prints_are_made_in_little_memory() -> None:
    generator, count = np.random.default_rng(0), 6000
    images = generator.integers(0, 255, (count, PLANES), np.uint8)
    hashes = np.zeros((count, len(CROPS)), np.uint64)
    keys = tuple(map(str, range(count)))
    prints = Prints(keys, np.zeros((count, 16), np.uint8), hashes, images, coarse(images[:]))
    tracemalloc.start()
    turned = flipped(prints)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / count < 4096
    assert (turned.planes[-3:] == mirrored(images[-3:])).all()
    assert (turned.coarse[-3:] == coarse(mirrored(images[-3:]))).all()
    assert len(np.unique(turned.hashes[:, 0])) > count * 0.99
