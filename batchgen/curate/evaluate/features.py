"""Features of a set of images, computed once: blocks of them are kept in a store."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from batchgen.curate.evaluate.distribution import blocks
from batchgen.curate.evaluate.sets import ImageSet
from batchgen.models.extractors import Extractor
from batchgen.storage import Store

Array = np.ndarray[Any, Any]
FOLDER = "_batchgen/evaluations/features"
BLOCK = 256  # images whose features are one file


def features_of(
    images: ImageSet,
    extractor: Extractor,
    store: Store,
    tell: Callable[[int], None] = lambda done: None,
) -> Array:
    """Features (n, d) float32 of a set, as an array on disk that has no name.

    A block that an earlier or interrupted evaluation has kept is read, not computed. Its name is a
    hash of the pixels and of the extractor, so it is never that of other images.

    Args:
        tell: called with the number of images that are done.
    """
    parts = list(blocks(len(images), BLOCK))
    names = [_name(images, part, extractor) for part in parts]
    kept = set(store.list(FOLDER))
    waiting = [part for part, name in zip(parts, names, strict=True) if name not in kept]
    pixels = _blocks_of(images, parts) if waiting else iter(())
    found: Array | None = None
    for part, name in zip(parts, names, strict=True):
        group = next(pixels, [])
        if name in kept:
            data = np.load(io.BytesIO(store.read(f"{FOLDER}/{name}")), allow_pickle=False)
        else:
            data = extractor(group)
            sink = io.BytesIO()
            np.save(sink, data, allow_pickle=False)
            store.put(f"{FOLDER}/{name}", sink.getvalue())
        if found is None:
            found = _on_disk(len(images), data.shape[1])
        found[part] = data
        tell(part.stop)
    assert found is not None
    return found


def _name(images: ImageSet, part: slice, extractor: Extractor) -> str:
    facts = hashlib.sha256(extractor.fingerprint.encode() + b"".join(images.digests[part]))
    return f"{facts.hexdigest()[:32]}.npy"


def _blocks_of(images: ImageSet, parts: list[slice]) -> Iterator[list[Array]]:
    pixels = images.pixels()
    for part in parts:
        yield [next(pixels) for _ in range(part.stop - part.start)]


def _on_disk(count: int, width: int) -> Array:
    """An array in a temporary file that is gone when nobody uses it any more."""
    with tempfile.TemporaryFile(prefix="batchgen-features-") as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(count, width))
