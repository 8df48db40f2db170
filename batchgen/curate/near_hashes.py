"""Finds the pairs of hashes that differ in few bits: exactly, without comparing all pairs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from batchgen.images.perceptual_hash import BITS

Array = np.ndarray[Any, Any]

MOST_BITS = 16  # with more, nearly all pairs are compared
_ROWS, _COLUMNS = 256, 2048  # of a tile that is compared at once: 4 MiB
_FEW = 1 << 21  # pairs that are compared without bands, or at once
_LARGE = 600  # candidates of a run that is worth a tile of its own
_THREADS = 2
_AHEAD = 8


class Pairs(NamedTuple):
    """Places in the first and in the second array, and the bits in which their hashes differ."""

    first: Array
    second: Array
    bits: Array


def pairs_within(first: Array, second: Array, bits: int) -> Iterator[Pairs]:
    """All pairs of hashes that differ in at most ``bits`` bits, in parts, each pair once.

    The 64 bits are divided into ``bits + 1`` bands. Two hashes that differ in at most ``bits``
    bits are equal in at least one band, so only hashes that share a band are compared, and no pair
    is missed.

    Args:
        first, second: hashes, uint64 (n,) and (m,).
        bits: 0 to ``MOST_BITS``.
    """
    masks = band_masks(bits)
    if len(first) * len(second) <= _FEW:
        every = np.arange(len(first)), np.arange(len(second))
        yield from _compared([every], masks[:0], first, second, bits)
        return
    for band, mask in enumerate(masks):
        runs = _Runs(first, second, mask)
        if runs.candidates > _LARGE * runs.count:
            yield from _ordered(list(runs.places()), masks[:band], first, second, bits)
        else:
            yield from _expanded(runs, masks[:band], first, second, bits)


def band_masks(bits: int) -> Array:
    """The bands: masks of ``bits + 1`` disjoint sets of bits, which cover all 64.

    A band takes every (bits + 1)-th bit, so that each has bits of low and of high frequencies.
    """
    bands = bits + 1
    masks = np.zeros(bands, np.uint64)
    for place in range(BITS):
        masks[place % bands] |= np.uint64(1) << np.uint64(place)
    return masks


def nearest(first: Array, second: Array) -> Array:
    """For each of the first hashes, the least number of bits to any of the second."""
    best = np.full(len(first), BITS + 1, np.uint8)
    for top in range(0, len(first), _ROWS):
        for left in range(0, len(second), _COLUMNS):
            rows = first[top : top + _ROWS, None]
            found = np.bitwise_count(rows ^ second[None, left : left + _COLUMNS]).min(axis=1)
            np.minimum(best[top : top + _ROWS], found, out=best[top : top + _ROWS])
    return best


class _Runs:
    """The runs of a band: hashes of the first and of the second that are equal in it."""

    def __init__(self, first: Array, second: Array, mask: np.uint64) -> None:
        keys, others = first & mask, second & mask
        self.order = np.argsort(keys, kind="stable")
        self.second_order = np.argsort(others, kind="stable")
        keys, others = keys[self.order], others[self.second_order]
        changes = np.ones(len(keys), bool)
        changes[1:] = keys[1:] != keys[:-1]
        self.starts = np.flatnonzero(changes)
        self.ends = np.append(self.starts[1:], len(keys))
        self.left = np.searchsorted(others, keys[self.starts], "left")
        self.right = np.searchsorted(others, keys[self.starts], "right")

    @property
    def count(self) -> int:
        return int((self.left < self.right).sum())

    @property
    def candidates(self) -> int:
        return int(((self.ends - self.starts) * (self.right - self.left)).sum())

    def places(self) -> Iterator[tuple[Array, Array]]:
        """Places of each run: those in the first, those in the second."""
        for run in np.flatnonzero(self.left < self.right):
            yield (
                self.order[self.starts[run] : self.ends[run]],
                self.second_order[self.left[run] : self.right[run]],
            )


def _expanded(
    runs: _Runs, earlier: Array, first: Array, second: Array, bits: int
) -> Iterator[Pairs]:
    """The pairs of many small runs, all at once."""
    left = np.repeat(runs.left, runs.ends - runs.starts)
    counts = np.repeat(runs.right, runs.ends - runs.starts) - left
    some = np.flatnonzero(counts)
    ends = np.cumsum(counts[some])
    start = 0
    while start < len(some):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _FEW, "right")))
        part = some[start:stop]
        each = counts[part]
        number = np.arange(int(each.sum())) - np.repeat(np.cumsum(each) - each, each)
        one = np.repeat(runs.order[part], each)
        other = runs.second_order[np.repeat(left[part], each) + number]
        differ = first[one] ^ second[other]
        count = np.bitwise_count(differ)
        near = np.flatnonzero(count <= bits)
        new = _is_new(differ[near], earlier)
        near = near[new]
        yield Pairs(one[near], other[near], count[near])
        start = stop


def _is_new(differ: Array, earlier: Array) -> Array:
    """Whether pairs that differ so were not found in an earlier band."""
    new = np.ones(len(differ), bool)
    for mask in earlier:
        new &= (differ & mask) != 0
    return new


def _ordered(
    runs: list[tuple[Array, Array]], earlier: Array, first: Array, second: Array, bits: int
) -> Iterator[Pairs]:
    """Compare the runs in threads, a bounded number ahead; the order stays."""
    waiting: deque[Future[list[Pairs]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for some in _batched(runs):
            waiting.append(pool.submit(_compared, some, earlier, first, second, bits))
            if len(waiting) > _AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _batched(
    runs: list[tuple[Array, Array]],
) -> Iterator[list[tuple[Array, Array]]]:
    """Runs in batches of about equal work; a large run is divided."""
    batch, work = list[tuple[Array, Array]](), 0
    for places, others in runs:
        rows = max(1, (_ROWS * _COLUMNS * 8) // max(1, len(others)))
        for top in range(0, len(places), rows):
            batch.append((places[top : top + rows], others))
            work += len(batch[-1][0]) * len(others) + 1000
            if work > _ROWS * _COLUMNS * 8:
                yield batch
                batch, work = [], 0
    if batch:
        yield batch


def _compared(
    runs: list[tuple[Array, Array]], earlier: Array, first: Array, second: Array, bits: int
) -> list[Pairs]:
    """The pairs of some runs, without those that are equal in an earlier band as well."""
    found: list[Pairs] = []
    for places, others in runs:
        rows, columns = first[places], second[others]
        for top in range(0, len(rows), _ROWS):
            for left in range(0, len(columns), _COLUMNS):
                part = rows[top : top + _ROWS, None] ^ columns[None, left : left + _COLUMNS]
                places_in = np.flatnonzero(np.bitwise_count(part) <= bits)
                if not len(places_in):
                    continue
                differ = part.ravel()[places_in]
                new = _is_new(differ, earlier)
                row, column = np.divmod(places_in[new], part.shape[1])
                count = np.bitwise_count(differ[new])
                found.append(Pairs(places[top + row], others[left + column], count))
    return found
