"""The embeddings of an output's samples, and which of them are near: exactly, or by faiss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.curate.near import Matches, Near, NearVectors
from batchgen.curate.score_sets import score_sets
from batchgen.errors import InputError
from batchgen.images.perceptual_hash import BITS
from batchgen.output.find import contents
from batchgen.output.formats import format_of
from batchgen.output.ledger import Ledger

Array = np.ndarray[Any, Any]

EMBEDDING = "embedding"
_PROBES = 16  # lists of the index that are searched
_ROUNDS = 8  # of the clustering that makes the lists


def has_vectors(ledger: Ledger) -> bool:
    """Whether the output has embeddings: in its own columns, or in a complete score set."""
    return next(_tables(ledger), None) is not None


def vectors_of(ledger: Ledger, keys: Sequence[str]) -> Array:
    """The embeddings of these samples, float16 (n, d), of length 1.

    Raises:
        InputError: the output has none, or lacks that of a sample.
    """
    known = {key: place for place, key in enumerate(keys)}
    vectors: Array | None = None
    filled = np.zeros(len(keys), bool)
    for table in _tables(ledger):
        column = table.column(EMBEDDING).combine_chunks()
        size = column.type.list_size
        values = np.asarray(column.flatten()).reshape(-1, size)
        present = np.flatnonzero(np.asarray(column.is_valid()))
        places = np.array([known[key] for key in table.column("key").to_pylist()])[present]
        if vectors is None:
            vectors = np.zeros((len(keys), size), np.float16)
        vectors[places] = values
        filled[places] = True
    if vectors is None:
        raise InputError(
            f"--similarity compares embeddings, and {ledger.store.url} has no column {EMBEDDING}; "
            f"`batchgen score {ledger.store.url} --scorer embedding` makes it"
        )
    if not filled.all():
        missing = keys[int(np.argmin(filled))]
        raise InputError(f"{ledger.store.url}: sample {missing} has no {EMBEDDING}; score again")
    return vectors


def _tables(ledger: Ledger) -> Iterator[pa.Table]:
    """Key and embedding of the samples, shard by shard."""
    for one in score_sets(ledger):
        if one.complete and EMBEDDING in [column.name for column in one.record.columns]:
            for name in one.files:
                with ledger.store.open(name) as file:
                    parquet = pq.ParquetFile(file, pre_buffer=False)
                    yield parquet.read(["key", EMBEDDING], use_threads=False)
            return
    for plan in ledger.parts():
        form = format_of(plan)
        for marker in ledger.markers(ledger.states(plan).committed):
            files = dict(contents(ledger, marker))
            if EMBEDDING not in form.schema(files).names:
                return
            yield form.read(files, ["key", EMBEDDING])


def vectors_near(ledger: Ledger, keys: Sequence[str], least: float, approximate: bool) -> Near:
    """Which samples have near embeddings.

    Args:
        approximate: by an index of faiss, which may miss pairs; else all pairs are compared.
    """
    vectors = vectors_of(ledger, keys)
    if not approximate:
        return NearVectors(vectors, vectors, least)
    return IndexedVectors(vectors, vectors, least)


@dataclass(frozen=True)
class IndexedVectors:
    """Near copies by the cosine of their embeddings, found by an inverted index of faiss.

    Sets of less than ``fewest`` images are compared exactly, which is quicker than an index.
    """

    first: Array
    second: Array
    least: float
    fewest: int = 20_000

    def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
        if len(first) < self.fewest:
            yield from NearVectors(self.first, self.second, self.least)(first, second)
            return
        faiss = _faiss()
        ones = self.first[first].astype(np.float32)
        size, lists = ones.shape[1], math.isqrt(len(first))
        coarse = faiss.IndexFlatIP(size)
        index = faiss.IndexIVFFlat(coarse, size, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = _ROUNDS
        index.train(ones)
        index.nprobe = _PROBES
        index.add(ones)
        for start in range(0, len(second), 1024):
            places = second[start : start + 1024]
            queries = self.second[places].astype(np.float32)
            limits, products, found = index.range_search(queries, self.least)
            counts = np.diff(limits.astype(np.int64))
            none = np.full(len(found), BITS + 1, np.uint8)
            yield Matches(first[found], np.repeat(places, counts), none, np.minimum(products, 1))


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise InputError("--approximate needs faiss: `pip install 'batchgen[near]'`") from error
    return faiss
