"""Which images are near copies of each other, and which of each group of copies stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from batchgen.curate.near_hashes import Pairs, pairs_within
from batchgen.curate.prints import Prints, stored
from batchgen.images.likeness import coarse, likeness, mirrored
from batchgen.images.perceptual_hash import BITS, crop_hashes, distances

Array = np.ndarray[Any, Any]

_LEAF = 1024  # samples that are compared all with all
_GATHERED = 1 << 20  # candidates that are collected before they are compared
_PAIRS = 4096  # pairs whose pixels are compared at once
_BLOCK = 1024  # images that are mirrored at once
COARSE = 0.8  # pairs whose coarse correlation is lower are not compared by pixels


@dataclass(frozen=True)
class Matches:
    """Pairs of near copies: places in two sets, and how near they are.

    Attributes:
        bits: in which the hashes of the two images differ.
        likeness: the correlation of the two images, 0 to 1; 1 if their pixels are equal.
    """

    first: Array
    second: Array
    bits: Array
    likeness: Array


class Near(Protocol):
    """Tells which images of two sets are near copies; the places are those in the sets."""

    def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
        """All near pairs of the images at these places of the first and of the second set."""
        ...


@dataclass(frozen=True)
class NearImages:
    """Near copies by hash, confirmed by pixels.

    A pair is near if its pixels are equal, or if its hashes differ in at most ``bits`` bits (or
    the hash of one and of a small crop of the other in at most half as many) and the pixels
    correlate by at least ``least``.
    """

    first: Prints
    second: Prints
    bits: int
    least: float

    def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
        for one, other in self._candidates(first, second):
            yield from self._confirmed(one, other)

    def _candidates(self, first: Array, second: Array) -> Iterator[tuple[Array, Array]]:
        """Pairs whose hashes are near, many at a time; a pair may come more than once."""
        waiting, count = list[Array](), 0
        for pairs in self._hashed(first, second):
            waiting.append(first[pairs.first] * len(self.second) + second[pairs.second])
            count += len(pairs.first)
            if count >= _GATHERED:
                yield np.divmod(np.unique(np.concatenate(waiting)), len(self.second))
                waiting, count = [], 0
        if waiting:
            yield np.divmod(np.unique(np.concatenate(waiting)), len(self.second))

    def _hashed(self, first: Array, second: Array) -> Iterator[Pairs]:
        ones, others = self.first.hashes[first], self.second.hashes[second]
        yield from pairs_within(ones[:, 0], others[:, 0], self.bits)
        crops = ones.shape[1] - 1
        for found in pairs_within(ones[:, 1:].ravel(), others[:, 0], self.bits // 2):
            yield Pairs(found.first // crops, found.second, found.bits)
        for found in pairs_within(ones[:, 0], others[:, 1:].ravel(), self.bits // 2):
            yield Pairs(found.first, found.second // crops, found.bits)

    def _confirmed(self, first: Array, second: Array) -> Iterator[Matches]:
        for start in range(0, len(first), _PAIRS):
            one, other = first[start : start + _PAIRS], second[start : start + _PAIRS]
            same = (self.first.digests[one] == self.second.digests[other]).all(axis=1)
            products = np.einsum("ij,ij->i", self.first.coarse[one], self.second.coarse[other])
            alike = (products >= COARSE) & ~same
            found = same.astype(np.float32)
            found[alike] = likeness(self.first.planes[one[alike]], self.second.planes[other[alike]])
            near = found >= self.least
            one, other, found = one[near], other[near], found[near]
            bits = distances(self.first.hashes[one, 0], self.second.hashes[other, 0])
            yield Matches(one, other, bits, np.minimum(found, 1))


@dataclass(frozen=True)
class NearVectors:
    """Near copies by the cosine of their embeddings, which have length 1; compared in blocks."""

    first: Array
    second: Array
    least: float
    block: int = 2048

    def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
        for top in range(0, len(first), self.block):
            rows = first[top : top + self.block]
            ones = self.first[rows].astype(np.float32)
            for left in range(0, len(second), self.block):
                columns = second[left : left + self.block]
                products = ones @ self.second[columns].astype(np.float32).T
                places = np.flatnonzero(products >= self.least)
                if len(places):
                    row, column = np.divmod(places, len(columns))
                    none = np.full(len(places), BITS + 1, np.uint8)
                    found = products.ravel()[places]
                    yield Matches(rows[row], columns[column], none, np.minimum(found, 1))


@dataclass(frozen=True)
class Either:
    """Near by any of several measures."""

    measures: tuple[Near, ...]

    def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
        for near in self.measures:
            yield from near(first, second)


@dataclass(frozen=True)
class Nearest:
    """For each image of a set its nearest near copy in another: its place, or -1."""

    place: Array
    bits: Array
    likeness: Array = field(repr=False)


def nothing(size: int) -> Nearest:
    """No near copy of any of so many images."""
    none = np.full(size, -1, np.int64), np.full(size, BITS + 1, np.uint8)
    return Nearest(*none, np.full(size, -1, np.float32))


def nearest_of(near: Near, first: Array, second: Array, size: int) -> Nearest:
    """The nearest of the ``first`` for each of the ``second``: the most alike, then the earliest.

    Args:
        first: places in the first set; the earlier one of equally near ones counts.
        second: places in the second set.
        size: of the second set.
    """
    rank = np.full(int(first.max(initial=-1)) + 2, np.iinfo(np.int64).max)
    rank[first] = np.arange(len(first))
    result = nothing(size)
    place, bits, alike = result.place, result.bits, result.likeness
    for found in near(first, second):
        order = np.lexsort((rank[found.first], -found.likeness, found.second))
        _, best = np.unique(found.second[order], return_index=True)
        best = order[best]
        one, other, score = found.first[best], found.second[best], found.likeness[best]
        before = np.where(place[other] < 0, len(rank) - 1, place[other])
        nearer = (score > alike[other]) | ((score == alike[other]) & (rank[one] < rank[before]))
        one, other, best = one[nearer], other[nearer], best[nearer]
        place[other], alike[other], bits[other] = one, score[nearer], found.bits[best]
    return result


def staying(near: Near, order: Array) -> Array:
    """The images that stay: in this order, each one that is no near copy of one that stays.

    So every other image is a near copy of one that stays, and no two that stay are near copies.
    """
    if len(order) <= _LEAF:
        return _staying_of_few(near, order)
    half = len(order) // 2
    first = staying(near, order[:half])
    copies = [found.second for found in near(first, order[half:])]
    rest = order[half:]
    if copies:
        rest = rest[~np.isin(rest, np.concatenate(copies))]
    return np.concatenate([first, staying(near, rest)]) if len(rest) else first


def _staying_of_few(near: Near, order: Array) -> Array:
    rank = {place: number for number, place in enumerate(order.tolist())}
    earlier: dict[int, list[int]] = {}
    for found in near(order, order):
        for one, other in zip(found.first.tolist(), found.second.tolist(), strict=True):
            if rank[one] < rank[other]:
                earlier.setdefault(other, []).append(one)
    kept: set[int] = set()
    for place in order.tolist():
        if not any(one in kept for one in earlier.get(place, ())):
            kept.add(place)
    return np.array([place for place in order.tolist() if place in kept], np.int64)


def flipped(prints: Prints) -> Prints:
    """The prints of the same images, mirrored left to right; a block of them at a time."""
    hashes, vectors = np.empty_like(prints.hashes), np.empty_like(prints.coarse)

    def blocks() -> Iterator[Array]:
        for start in range(0, len(prints), _BLOCK):
            block = slice(start, start + _BLOCK)
            images = mirrored(np.asarray(prints.planes[block]))
            hashes[block] = [crop_hashes(_grey(one)) for one in images]
            vectors[block] = coarse(images)
            yield images

    planes = stored(blocks())
    return Prints(prints.keys, np.zeros_like(prints.digests), hashes, planes, vectors)


def _grey(image: Array) -> Array:
    """The grey levels of planes as an RGB image."""
    side = 32
    return np.repeat(image[: side * side].reshape(side, side, 1), 3, axis=2)
