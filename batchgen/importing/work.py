"""Imports a source: reads its rows in order, several images at a time; writes and counts them."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute

from batchgen.errors import InputError
from batchgen.importing.kinds.choose import about_kinds, kind_named, kind_of
from batchgen.importing.listing import Listing, listed
from batchgen.importing.records import LABEL, OBJECTS, SPLIT, with_prompts
from batchgen.importing.rows import (
    KEY,
    Dataset,
    ImageMode,
    Item,
    Kind,
    Later,
    Options,
    Place,
    Reject,
    Row,
)
from batchgen.importing.summary import Summary, Tell
from batchgen.importing.target import ROW_GROUP_BYTES, ROW_GROUP_ROWS, Target, Writing
from batchgen.labels.columns import IMAGE
from batchgen.storage import Stat, absolute, is_within

THREADS = max(2, min(8, os.cpu_count() or 1))
_AHEAD = 2 * THREADS  # images that are read before they are written
_TELL_EVERY_S = 0.5
_MOST_REJECTS = 4096  # rejected rows that are kept in memory before they are written
_SHOWN = 3
_OWN_PROMPTS = ("classes", "image-folder")  # kinds that make prompts by themselves


@dataclass(frozen=True)
class Source:
    """A source with its kind.

    Attributes:
        images: whether its images are copied into the rows.
    """

    listing: Listing
    kind: Kind
    images: ImageMode
    image_root: str | None = None
    prompt: str | None = None

    def options(self) -> Options:
        root = None if self.image_root is None else listed(self.image_root)
        return Options(self.images, root, self.prompt)


def source_at(
    place: str,
    kind: str | None = None,
    images: ImageMode | None = None,
    image_root: str | None = None,
    prompt: str | None = None,
) -> Source:
    """Find a source and its kind.

    Raises:
        InputError: there is none, or its kind cannot be told.
    """
    if kind == "hub":
        return Source(Listing(place, "", {place: Stat(place, 0, "")}), kind_named(kind), "bytes")
    named = kind_named(kind) if kind is not None else None
    listing = listed(place)
    found = named or kind_of(listing)
    if found is None:
        some = ", ".join(list(listing.files)[:_SHOWN])
        raise InputError(
            f"source {place}: its kind cannot be told from its files ({some}); use --kind with one "
            f"of {about_kinds()}"
        )
    mode: ImageMode = images or ("bytes" if listing.is_local else "reference")
    return Source(listing, found, mode, image_root, prompt)


def _prompted(source: Source, dataset: Dataset) -> Dataset:
    """The dataset with the prompts that `--prompt` asks for.

    Raises:
        InputError: the rows have no classes to name in a prompt.
    """
    template, columns = source.options().prompt, dataset.columns
    if template is None or source.kind.name in _OWN_PROMPTS:
        return dataset
    names = columns.names.get(LABEL)
    if not names:
        raise InputError(
            f"--prompt needs a class of each row, in a column {LABEL}, and {source.listing.source} "
            f"({source.kind.name}) has none"
        )
    if "prompt" in columns.parts:
        dataset.notes.append("--prompt has no effect: the source has prompts of its own")
    return with_prompts(dataset, template, names)


def import_source(
    source: Source,
    target: Target,
    limit: int | None = None,
    tell: Tell = lambda summary: None,
    rejected_limit: float = 1.0,
) -> Summary:
    """Import a source to a target, which gets all of it or nothing.

    Args:
        limit: the number of rows after which the import ends.
        tell: called about twice a second.
        rejected_limit: above this share nothing is written but the list of rejected rows.

    Raises:
        InputError: the source cannot be read, or gives no row.
    """
    if is_within(target.url, source.listing.source):
        raise InputError(
            f"target {target.url} is the source {source.listing.source} or inside of it, so the "
            "next import would read it; choose a target outside of the source"
        )
    summary = Summary(source.listing.source, target.url, source.kind.name)
    dataset = _prompted(source, source.kind.read(source.listing, source.options()))
    summary.total, summary.notes = dataset.total, dataset.notes
    summary.columns = dict(dataset.columns.parts)
    summary.images_are = source.images
    with Writing(target, dataset.columns) as writing:
        _Import(dataset, writing, summary, limit, tell).run()
        if summary.rejected:
            summary.rejects = f"{target.store.url.rstrip('/')}/{target.rejects}"
        if not summary.rows:
            writing.finish_rejects()
            raise InputError(_nothing(summary))
        if summary.share_rejected > rejected_limit:
            writing.finish_rejects()
            return summary
        summary.bytes = writing.finish()
    if source.images == "reference" and summary.references:
        summary.roots = [source.listing.image_root]
        if source.image_root is not None:
            summary.roots.append(absolute(source.image_root))
    elif summary.references:
        summary.notes.append(
            f"{summary.references:,} images are only named by their URL; the run fetches them if "
            "input.uri_roots allows their hosts, such as --set 'input.uri_roots=[https://HOST]'"
        )
    return summary


def _nothing(summary: Summary) -> str:
    said = f"source {summary.source} (kind {summary.kind}): no row was imported"
    if not summary.rejected:
        return f"{said}; it has no rows"
    reason, message = next(iter(summary.examples.items()))
    return f"{said}; {summary.rejected:,} were rejected, the first for {reason}: {message}"


class _Import:
    """One import under way: rows that wait for their table, and the keys that were seen."""

    def __init__(
        self, dataset: Dataset, writing: Writing, summary: Summary, limit: int | None, tell: Tell
    ) -> None:
        self._dataset, self._writing, self._summary = dataset, writing, summary
        self._limit, self._tell, self._told = limit, tell, time.monotonic()
        self._seen: set[bytes] = set()
        self._rows: list[Row] = []
        self._tables: list[pa.Table] = []
        self._bytes = self._table_bytes = self._table_rows = 0
        self._rejects: list[dict[str, str]] = []
        self._names = dataset.columns.names.get(LABEL)
        self._counts: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()

    def run(self) -> None:
        """Read all rows, up to the limit."""
        with ThreadPoolExecutor(THREADS) as pool:
            for item in _in_order(self._dataset.items, pool):
                self._take(item)
                if time.monotonic() - self._told > _TELL_EVERY_S:
                    self._told = time.monotonic()
                    self._tell(self._summary)
                if self._limit is not None and self._summary.rows >= self._limit:
                    break
        self._flush()
        self._write()
        self._flush_rejects()
        names = self._names or ()
        told = {name: self._counts[name] for name in names if self._counts[name]}
        self._summary.classes = told or dict(sorted(self._counts.items()))
        self._summary.splits = dict(sorted(self._splits.items()))
        self._tell(self._summary)

    def _take(self, item: Row | Reject | pa.Table) -> None:
        if isinstance(item, Reject):
            self._reject(item)
        elif isinstance(item, pa.Table):
            self._take_table(item)
        elif self._is_new(item.key, item.place):
            self._rows.append(item)
            self._bytes += _size_of(item)
            self._summary.rows += 1
            if self._bytes > ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_ROWS:
                self._flush()

    def _take_table(self, table: pa.Table) -> None:
        if self._limit is not None:
            table = table.slice(0, self._limit - self._summary.rows)
        if not self._dataset.unique:
            keys = table.column(KEY).to_pylist()
            table = table.filter(pa.array([self._is_new(key, Place("")) for key in keys]))
        self._summary.rows += table.num_rows
        self._count(table)
        self._keep(table.cast(self._writing.schema))

    def _is_new(self, key: str, place: Place) -> bool:
        """Whether no row before has this key; else the row is rejected."""
        if self._dataset.unique:
            return True
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in self._seen:
            where = f"{place.file} {place.at}".strip() or self._summary.source
            message = f"{where}: an earlier row has the key {key!r}; allowed: keys that are unique"
            self._reject(Reject(place, "duplicate-key", message, key))
            return False
        self._seen.add(digest)
        return True

    def _flush(self) -> None:
        """Turn the waiting rows into a table; rows that do not fit the types are rejected."""
        if not self._rows:
            return
        schema, rows = self._writing.schema, self._rows
        try:
            table = _table(rows, schema)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            rows = list(self._fitting(rows, schema))
            table = _table(rows, schema)
        self._rows, self._bytes = [], 0
        self._count(table)
        self._keep(table)

    def _fitting(self, rows: list[Row], schema: pa.Schema) -> Iterator[Row]:
        for row in rows:
            try:
                _table([row], schema)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                self._summary.rows -= 1
                where = f"{row.place.file} {row.place.at}".strip()
                said = str(error).partition("\n")[0]
                message = f"{where}: a value does not fit its column: {said}"
                self._reject(Reject(row.place, "bad-value", message, row.key))
            else:
                yield row

    def _keep(self, table: pa.Table) -> None:
        """Collect small tables, so that row groups are not small."""
        self._tables.append(table)
        self._table_bytes += table.nbytes
        self._table_rows += table.num_rows
        if self._table_bytes > ROW_GROUP_BYTES or self._table_rows >= ROW_GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        if self._tables:
            self._writing.add(pa.concat_tables(self._tables).combine_chunks())
        self._tables, self._table_bytes, self._table_rows = [], 0, 0

    def _count(self, table: pa.Table) -> None:
        """Count images, objects, classes and splits."""
        summary, parts = self._summary, self._dataset.columns.parts
        if "image" in parts:
            column = table.column(parts["image"])
            summary.images += table.num_rows - column.null_count
            if column.type == IMAGE:
                data = pa.compute.struct_field(column, "bytes")
                summary.references += data.null_count - column.null_count
        label, objects = parts.get(LABEL), parts.get(OBJECTS)
        if label is not None:
            names = self._dataset.columns.names.get(label)
            self._names = names
            self._counts.update(_named(table.column(label), names))
        if objects is not None and pa.types.is_struct(table.schema.field(objects).type):
            inner = pa.compute.struct_field(table.column(objects), "category")
            flat = pa.compute.list_flatten(inner)
            summary.objects += len(flat)
            if label is None:
                names = self._dataset.columns.names.get(objects)
                self._names = names
                self._counts.update(_named(flat, names))
        if SPLIT in table.column_names:
            self._splits.update(_named(table.column(SPLIT), None))

    def _reject(self, reject: Reject) -> None:
        summary = self._summary
        summary.rejected += 1
        summary.reasons[reject.reason] = summary.reasons.get(reject.reason, 0) + 1
        summary.examples.setdefault(reject.reason, reject.message)
        row = {"key": reject.key, "source_file": reject.place.file, "place": reject.place.at}
        text = {**row, "reason": reject.reason, "message": reject.message}
        self._rejects.append(
            {name: one.encode(errors="backslashreplace").decode() for name, one in text.items()}
        )
        if len(self._rejects) >= _MOST_REJECTS:
            self._flush_rejects()

    def _flush_rejects(self) -> None:
        if self._rejects:
            self._writing.reject(list(self._rejects))
        self._rejects = []


def _in_order(items: Iterator[Item], pool: ThreadPoolExecutor) -> Iterator[Row | Reject | pa.Table]:
    """Make rows that read files in threads, a bounded number ahead; the order stays."""
    waiting: deque[Future[Row | Reject] | Row | Reject | pa.Table] = deque()
    try:
        for item in items:
            if isinstance(item, Later):
                waiting.append(pool.submit(item.row))
            elif not waiting:
                yield item
                continue
            else:
                waiting.append(item)
            while len(waiting) > _AHEAD:
                yield _ready(waiting.popleft())
        while waiting:
            yield _ready(waiting.popleft())
    finally:
        for one in waiting:
            if isinstance(one, Future):
                one.cancel()


def _ready(item: Any) -> Row | Reject | pa.Table:
    return item.result() if isinstance(item, Future) else item


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array([row.key for row in rows], pa.string())]
    for field in list(schema)[1:]:
        arrays.append(pa.array([row.values.get(field.name) for row in rows], field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _named(column: Any, names: tuple[str, ...] | None) -> Counter[str]:
    """Values of a column by how often they occur, class numbers by name."""
    found: Counter[str] = Counter()
    for one in pa.compute.value_counts(column).to_pylist():
        value = one["values"]
        if value is not None:
            known = names is not None and isinstance(value, int) and 0 <= value < len(names)
            found[names[value] if known and names else str(value)] += one["counts"]
    return found


def _size_of(row: Row) -> int:
    """About the bytes of a row in memory."""
    return 64 + sum(_size(value) for value in row.values.values())


def _size(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(one) for one in value.values())
    if isinstance(value, list):
        return 8 * len(value) + sum(_size(one) for one in value if not isinstance(one, float | int))
    return 8
