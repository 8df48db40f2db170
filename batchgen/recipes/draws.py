"""Draws values from hashes, so that a value depends only on seed, sample and field."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_BLOCK = 1 << 22  # scores in memory at a time, 8 bytes each
_STANDARD = NormalDist()


class Dice:
    """Draws 64-bit words by BLAKE2b from a seed, the name of a field, and the keys of samples.

    Words of one field and key are the same in any process, whatever else is drawn.
    """

    def __init__(self, seed: int, field: str) -> None:
        self._salt = seed.to_bytes(16, "little")
        self._person = hashlib.blake2b(field.encode(), digest_size=16).digest()

    def word(self, key: bytes) -> int:
        """Draw the word of one sample."""
        return int.from_bytes(self._digest(key), "little")

    def words(self, keys: Sequence[bytes]) -> Words:
        """Draw the words of several samples."""
        return np.frombuffer(b"".join(map(self._digest, keys)), dtype="<u8")

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=8, salt=self._salt, person=self._person).digest()


@cache
def word_of(option: str) -> int:
    """Return the word that stands for an option of a choice."""
    return int.from_bytes(hashlib.blake2b(option.encode(), digest_size=8).digest(), "little")


def words_of(options: Sequence[str]) -> Words:
    """Return the words of several options."""
    return np.array([word_of(one) for one in options], dtype=np.uint64)


def mixed(words: Any, option: int) -> Any:
    """Mix words with that of an option; the result is uniform, and independent for each option.

    This is the finalizer of SplitMix64 (Steele et al., 2014).
    """
    mix = words ^ np.uint64(option)
    mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mix ^ (mix >> np.uint64(31))


def _mixed_one(word: int, option: int) -> int:
    mix = word ^ option
    mix = ((mix ^ (mix >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mix = ((mix ^ (mix >> 27)) * 0x94D049BB133111EB) & _MASK
    return mix ^ (mix >> 31)


def units(words: Words) -> Floats:
    """Turn words into numbers above 0 and below 1."""
    numbers: Floats = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return numbers


def _unit(word: int) -> float:
    return ((word >> 12) + 0.5) * 2.0**-52


def chosen(words: Words, options: Sequence[str], weights: Sequence[float]) -> Places:
    """Choose an option for each word, with probabilities that are proportional to the weights.

    Method: weighted rendezvous hashing. An option that is added, or gets a larger weight, takes
    samples from the others; no sample moves between the others.
    """
    best = np.full(len(words), -np.inf)
    place = np.zeros(len(words), dtype=np.int64)
    for number, (option, weight) in enumerate(zip(options, weights, strict=True)):
        if weight > 0:
            score = np.log(units(mixed(words, word_of(option)))) / weight
            place = np.where(score > best, number, place)
            best = np.maximum(score, best)
    return place


def best(word: int, options: Sequence[int], weights: Sequence[float]) -> int:
    """Choose the option that ``chosen`` chooses; options are given by their words."""
    found, most = 0, -math.inf
    for number, (option, weight) in enumerate(zip(options, weights, strict=True)):
        if weight > 0:
            score = math.log(_unit(_mixed_one(word, option))) / weight
            if score > most:
                found, most = number, score
    return found


def ranked(word: int, options: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Order the options for one word; the first is the one that ``chosen`` chooses.

    The first k are a weighted draw of k different options (Efraimidis and Spirakis, 2006).
    """
    scored = [
        (math.log(_unit(_mixed_one(word, word_of(option)))) / weight, -number)
        for number, (option, weight) in enumerate(zip(options, weights, strict=True))
        if weight > 0
    ]
    return [-number for _, number in sorted(scored, reverse=True)]


def nearest_of(words: Words, pool: Words, without: Places | None = None) -> Places:
    """Choose a member of a pool for each word, each with the same probability.

    A member that is added takes samples from the others; no sample moves between the others.

    Args:
        words: those of the samples.
        pool: those of the members.
        without: the number of the member that each sample must not get; -1: it may get any.
    """
    place = np.zeros(len(words), dtype=np.int64)
    step = max(1, _BLOCK // max(1, len(pool)))
    for start in range(0, len(words), step):
        scores = mixed(words[start : start + step, None] ^ pool[None, :], 0)  # (samples, members)
        if without is not None:
            left_out = without[start : start + step]
            rows = np.flatnonzero(left_out >= 0)
            scores[rows, left_out[rows]] = 0
        place[start : start + step] = scores.argmax(axis=1)
    return place


def numbered(word: int, count: int) -> int:
    """Choose one of ``count`` numbers; if the count grows, samples move only to new numbers.

    Method: jump consistent hashing (Lamping and Veach, 2014).
    """
    place, following = 0, 0.0
    state = word
    while following < count:
        place = int(following)
        state = (state * 2862933555777941757 + 1) & _MASK
        following = (place + 1) * (2.0**31 / ((state >> 33) + 1))
    return place


def uniform(words: Words, low: float, high: float) -> Floats:
    """Draw from low to high."""
    return low + (high - low) * units(words)


def log_uniform(words: Words, low: float, high: float) -> Floats:
    """Draw from low to high so that the logarithm is uniform."""
    numbers: Floats = np.exp(uniform(words, math.log(low), math.log(high)))
    return np.clip(numbers, low, high)


def normal(
    words: Words, mean: float, std: float, low: float = -math.inf, high: float = math.inf
) -> Floats:
    """Draw from the part of a normal distribution that is between low and high.

    No values pile up at the limits, as they would if they were clipped.
    """
    below = _STANDARD.cdf((low - mean) / std)
    above = _STANDARD.cdf((high - mean) / std)
    shares = below + (above - below) * units(words)
    tiny = 2.0**-53
    shares = np.clip(shares, tiny, 1 - tiny)
    points = np.fromiter(map(_STANDARD.inv_cdf, shares.tolist()), np.float64, len(shares))
    return np.clip(mean + std * points, low, high)


def on_grid(words: Words, low: float, high: float, step: float) -> Floats:
    """Draw one of low, low + step, and so on up to high, each with the same probability."""
    count = grid_size(low, high, step)
    numbers = np.minimum((units(words) * count).astype(np.int64), count - 1)
    return rounded(low + numbers * step)


def snapped(values: Floats, low: float, high: float, step: float) -> Floats:
    """Move values to the nearest of low, low + step, and so on, but not above high.

    Without a lowest value the grid contains 0.
    """
    start = low if math.isfinite(low) else 0.0
    numbers = np.round((values - start) / step)
    if math.isfinite(high):
        numbers = np.minimum(numbers, grid_size(start, high, step) - 1)
    return rounded(start + numbers * step)


def grid_size(low: float, high: float, step: float) -> int:
    """Number of values from low to high in steps."""
    return math.floor((high - low) / step + 1e-9) + 1


def rounded(values: Floats) -> Floats:
    """Remove the noise of binary fractions, so that 0.1 + 2 x 0.1 is 0.3."""
    numbers: Floats = np.round(values, 10)
    return numbers
