"""Prints of images: what is kept of each to find its copies, in about 2 KiB an image."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from batchgen.errors import InputError, RejectRow
from batchgen.images.likeness import PLANES, coarse, planes
from batchgen.images.perceptual_hash import crop_hashes
from batchgen.images.source import open_image

Array = np.ndarray[Any, Any]

DIGEST = 16  # bytes of a digest of pixels
THREADS = max(2, min(8, os.cpu_count() or 1))
_BATCH = 64  # images of one call of a thread
_SHOWN = 3


@dataclass(frozen=True)
class Picture:
    """An image to print: its key, and its file."""

    key: str
    data: object


@dataclass(frozen=True)
class Prints:
    """What is kept of n images to find copies among them.

    Attributes:
        keys: of the images.
        digests: SHA-256 of the pixels and their size, the first 16 bytes (n, 16).
        hashes: of each image after each of CROPS (n, 11); the first is that of the image.
        planes: each image in small (n, 1536); in a temporary file, not in memory.
        coarse: vectors that are near for images that are alike (n, 96).
        bad: reason -> number of the images that could not be read.
        examples: a few of these: key and message.
    """

    keys: tuple[str, ...]
    digests: Array
    hashes: Array
    planes: Array
    coarse: Array
    bad: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def unread(self) -> int:
        """Images that could not be read."""
        return sum(self.bad.values())


def stored(blocks: Iterable[Array]) -> Array:
    """Blocks of planes, one after the other, in a temporary file that has no name."""
    rows = 0
    with tempfile.TemporaryFile(prefix="batchgen-prints-") as file:
        for block in blocks:
            file.write(block.tobytes())
            rows += len(block)
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=(rows, PLANES))


@dataclass(frozen=True)
class _One:
    """The print of one image, or why there is none."""

    key: str
    digest: bytes = b""
    hashes: Array | None = None
    planes: Array | None = None
    reason: str = ""
    message: str = ""


def prints_of(
    pictures: Iterable[Picture],
    name: str,
    bad_limit: float = 0.1,
    option: str = "--rejected-limit",
) -> Prints:
    """Print images: they are read one after another, some in threads, and none is kept.

    Args:
        pictures: the images.
        name: of the set, for messages.
        bad_limit: fraction of the images that may be unreadable.
        option: of the command that sets the limit, for messages; empty: there is none.

    Raises:
        InputError: there is no image, or more are unreadable than the limit allows.
    """
    keys, digests, hashes, vectors = list[str](), list[bytes](), list[Array](), list[Array]()
    bad, examples = Counter[str](), list[tuple[str, str]]()
    with tempfile.TemporaryFile(prefix="batchgen-prints-") as file:
        for batch in _printed(pictures):
            good = [one for one in batch if one.planes is not None and one.hashes is not None]
            if good:
                images = np.stack([one.planes for one in good])  # type: ignore[misc]
                file.write(images.tobytes())
                vectors.append(coarse(images))
            keys += [one.key for one in good]
            digests += [one.digest for one in good]
            hashes += [one.hashes for one in good if one.hashes is not None]
            for one in batch:
                if one.planes is None:
                    bad[one.reason] += 1
                    examples.append((one.key, one.message))
            del examples[_SHOWN:]
        file.flush()
        _refuse(name, len(keys), sum(bad.values()), examples, (bad_limit, option))
        images = np.memmap(file, np.uint8, "r", shape=(len(keys), PLANES))
    return Prints(
        tuple(keys),
        np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST),
        np.stack(hashes),
        images,
        np.concatenate(vectors),
        dict(bad),
        tuple(examples),
    )


def _refuse(
    name: str, good: int, bad: int, examples: list[tuple[str, str]], limit: tuple[float, str]
) -> None:
    bad_limit, option = limit
    told = "; ".join(f"{key}: {message}" for key, message in examples)
    if bad > bad_limit * (good + bad):
        allowed = f"a fraction of {bad_limit:g}" if bad_limit else "none"
        raise InputError(
            f"{name}: {bad:,} of {good + bad:,} images cannot be read ({told}); allowed: "
            f"{allowed}{f' ({option})' if option else ''}"
        )
    if not good:
        raise InputError(f"{name}: it has no images")


def _printed(pictures: Iterable[Picture]) -> Iterator[list[_One]]:
    """Print batches of images in threads, a bounded number ahead; the order stays."""
    waiting: deque[Future[list[_One]]] = deque()
    source = iter(pictures)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="prints") as pool:
        while batch := list(islice(source, _BATCH)):
            waiting.append(pool.submit(_prints, batch))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _prints(batch: list[Picture]) -> list[_One]:
    return [_print(one) for one in batch]


def _print(one: Picture) -> _One:
    try:
        pixels = np.asarray(open_image(one.data))
    except RejectRow as error:
        return _One(one.key, reason=error.reason, message=error.message)
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()[:DIGEST]
    return _One(one.key, digest, crop_hashes(pixels), planes(pixels))
