"""Reads the input: each span of row groups is streamed once and cut into its pending shards.

A span is the work of one reader task. It begins and ends at row groups, so that a file with one
million rows in one row group is decoded once, and a span whose shards are committed is not read.
Only a shard that crosses the border of two spans reads a little of the next span.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError, RetryShard
from batchgen.plan.columns import largest_row, plain_table
from batchgen.plan.keys import row_key
from batchgen.plan.plan import COUNTED_COLUMN, Plan, SourceFile
from batchgen.records import ShardRows
from batchgen.spec.spec import Spec
from batchgen.storage import WrappedFile, open_input

MAX_SPANS = 64
_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
_MOST_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Group:
    """One row group. Its first row is row ``first_row`` of the input, ``file_row`` of the file."""

    path: str
    name: str
    size: int
    index: int
    first_row: int
    file_row: int
    rows: int
    etag: str = ""


@dataclass(frozen=True)
class Slice:
    """The rows and samples of one shard: rows ``first_row`` to ``stop_row - 1``.

    If the samples are listed, ``rows`` and ``variants`` have one entry for each of them; other
    rows between the first and the last do not belong to the shard.
    """

    shard: int
    first_row: int
    stop_row: int
    first_sample: int
    stop_sample: int
    rows: tuple[int, ...] = ()
    variants: tuple[int, ...] = ()

    def needs(self, first_row: int, stop_row: int) -> bool:
        """Whether it has rows from ``first_row`` to ``stop_row - 1``."""
        if not self.rows:
            return self.first_row < stop_row and first_row < self.stop_row
        return bisect.bisect_left(self.rows, first_row) < bisect.bisect_left(self.rows, stop_row)


@dataclass(frozen=True)
class Span:
    """Row groups in row order, and the pending shards that begin in them."""

    groups: tuple[Group, ...]
    slices: tuple[Slice, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def span_from_json(text: str) -> Span:
    tree = json.loads(text)
    return Span(
        tuple(Group(**group) for group in tree["groups"]),
        tuple(
            Slice(**{name: _tupled(value) for name, value in part.items()})
            for part in tree["slices"]
        ),
    )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def make_spans(plan: Plan, pending: Iterable[int], max_spans: int = MAX_SPANS) -> list[Span]:
    """Make spans that cover the pending shards, in row order; at most ``max_spans``."""
    groups = _row_groups(plan.files)
    slices = deque(_slice(plan, shard) for shard in sorted(pending))
    rows = sum(file.rows for file in plan.files)
    rows_per_span = max(1, -(-(rows if plan.place.listed else plan.rows) // max_spans))
    spans: list[Span] = []
    position = 0
    while slices and position < len(groups):
        start = position
        while position < len(groups) and (
            position == start
            or groups[position].first_row - groups[start].first_row < rows_per_span
        ):
            position += 1
        border = groups[position].first_row if position < len(groups) else rows
        mine = []
        while slices and slices[0].first_row < border:
            mine.append(slices.popleft())
        if mine:
            needed = [group for group in groups[start:] if _is_needed(group, mine)]
            spans.append(Span(tuple(needed), tuple(mine)))
    return spans


def _is_needed(group: Group, slices: list[Slice]) -> bool:
    if (
        group.first_row >= slices[-1].stop_row
        or group.first_row + group.rows <= slices[0].first_row
    ):
        return False
    return any(part.needs(group.first_row, group.first_row + group.rows) for part in slices)


def _row_groups(files: Iterable[SourceFile]) -> list[Group]:
    groups, first_row = [], 0
    for file in files:
        file_row = 0
        for index, rows in enumerate(file.row_groups):
            if rows:
                place = (index, first_row, file_row, rows)
                groups.append(Group(file.path, file.name, file.size, *place, file.etag))
            first_row += rows
            file_row += rows
    return groups


def _slice(plan: Plan, shard: int) -> Slice:
    first, stop = plan.sample_range(shard)
    whole = Slice(shard, *plan.row_range(shard), first, stop)
    if not plan.place.listed:
        return whole
    rows, variants = (one[first:stop].tolist() for one in (plan.listed.rows, plan.listed.variants))
    return replace(whole, rows=tuple(rows), variants=tuple(variants))


def read_columns(spec: Spec, names: Sequence[str]) -> list[str]:
    """List the source columns that a run needs, in the file's order: the mapped and kept ones."""
    mapped = set(spec.input.columns.mapped().values())
    keep = spec.input.keep_columns
    needed = [name for name in names if keep is None or name in keep or name in mapped]
    return needed or list(names)[:1]  # a table without columns has no number of rows


def read_span(span: Span, spec: Spec, columns: list[str]) -> Iterator[ShardRows]:
    """Stream a span's row groups once and yield each of its shards with its rows.

    Raises:
        InputError: a file was removed, changed its size, or cannot be decoded.
        RetryShard: the store failed to deliver it this time.
    """
    waiting = deque(span.slices)
    listed = sorted({row for part in span.slices for row in part.rows})
    window = _Window()
    with contextlib.closing(_Files(spec.input.path, columns)) as files:
        for group in span.groups:
            position = group.first_row
            for table, read_bytes in files.batches(group):
                for start, piece in _pieces(table, position, listed):
                    window.add(start, piece, group)
                window.read_bytes += read_bytes
                position += table.num_rows
                while waiting and waiting[0].stop_row <= position:
                    yield window.cut(waiting.popleft())
                if not waiting:
                    return
                window.forget_before(waiting[0].first_row)
                if waiting[0].first_row >= group.first_row + group.rows:
                    break
    raise InputError(
        f"the input has fewer rows than the plan: it ended before the last row of shard "
        f"{waiting[0].shard}"
    )


def _pieces(table: pa.Table, position: int, listed: list[int]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a batch to keep: all, or copies of those that are listed, one by one."""
    if not listed:
        yield position, table
    first, stop = (bisect.bisect_left(listed, row) for row in (position, position + table.num_rows))
    for row in listed[first:stop]:
        yield row, table.take([row - position])


class _Files:
    """Decodes row groups. A file stays open for the row groups that follow in it."""

    def __init__(self, url: str, columns: list[str]) -> None:
        self._url = url
        self._columns = columns
        self._path = ""
        self._raw: BinaryIO | None = None

    def close(self) -> None:
        if self._raw is not None:
            self._raw.close()
            self._raw = None

    def batches(self, group: Group) -> Iterator[tuple[pa.Table, int]]:
        """Yield the group's rows in batches, each with the number of bytes read for it."""
        if not group.path:
            yield _counted_rows(group).select(self._columns), 0
            return
        try:
            if self._raw is None or self._path != group.path:
                self._open(group)
            for batch in self._parquet.iter_batches(
                self._batch_rows(group),
                row_groups=[group.index],
                columns=self._columns,
                use_threads=False,
            ):
                table = pa.Table.from_batches([batch]).select(self._columns)
                yield plain_table(table), self._counted.take()
        except FileNotFoundError as error:
            raise InputError(
                f"input file {group.path} is missing; restore it, or write to a new output"
            ) from error
        except (pa.ArrowException, IndexError, KeyError) as error:
            raise _undecodable(group, error) from error
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # how Arrow reports a damaged page
                raise _undecodable(group, error) from error
            what = f"{type(error).__name__}: {error}"
            raise RetryShard(f"cannot read {group.path}: {what}") from error

    def _batch_rows(self, group: Group) -> int:
        """Choose the number of rows of a batch so that it stays within its bounds in memory.

        ``_BATCH_BYTES`` is for the mean row. ``_MOST_BYTES`` holds for any file: 1 kB may hold a
        thousand rows that all refer to one text of megabytes.
        """
        metadata = self._parquet.metadata.row_group(group.index)
        usual = _BATCH_BYTES * group.rows // max(1, metadata.total_byte_size)
        assert self._raw is not None
        at_most = _MOST_BYTES // max(1, largest_row(self._raw, metadata, self._columns))
        return int(min(_BATCH_ROWS, max(1, min(usual, at_most))))

    def _open(self, group: Group) -> None:
        self.close()
        self._raw, self._path = open_input(group.path, self._url, group.etag), group.path
        size = self._raw.seek(0, io.SEEK_END)
        if size != group.size:
            raise InputError(
                f"input file {group.path} has changed: planned with {group.size} bytes, "
                f"now it has {size}; restore it, or write to a new output"
            )
        self._raw.seek(0)
        self._counted = CountingFile(self._raw)
        self._parquet = pq.ParquetFile(
            pa.PythonFile(self._counted, mode="r"), pre_buffer=False, buffer_size=_BUFFER_BYTES
        )


def _counted_rows(group: Group) -> pa.Table:
    """Make rows that are in no file; see ``input.count``."""
    numbers = range(group.file_row, group.file_row + group.rows)
    return pa.table({COUNTED_COLUMN: pa.array(numbers, pa.int64())})


def _undecodable(group: Group, error: Exception) -> InputError:
    return InputError(
        f"input file {group.path}, row group {group.index}, cannot be decoded: {error}; replace it "
        "by an undamaged copy"
    )


@dataclass
class _Window:
    """The batches in memory, each with the row number of its first row, and the bytes read."""

    pieces: list[tuple[int, pa.Table, Group]] = field(default_factory=list)
    read_bytes: int = 0

    def add(self, first_row: int, table: pa.Table, group: Group) -> None:
        self.pieces.append((first_row, table, group))

    def forget_before(self, row: int) -> None:
        self.pieces = [piece for piece in self.pieces if piece[0] + piece[1].num_rows > row]

    def cut(self, part: Slice) -> ShardRows:
        tables, ids, keys = [], [], []
        for low, high, start, table, group in self._spanned(part):
            tables.append(table.slice(low - start, high - low))
            shift = group.file_row - group.first_row
            ids += [f"{group.name}#{row + shift}" for row in range(low, high)]
            keys += [row_key(group.name, row + shift) for row in range(low, high)]
        read_bytes, self.read_bytes = self.read_bytes, 0
        return ShardRows(
            part.shard,
            part.first_sample,
            part.stop_sample,
            pa.concat_tables(tables).combine_chunks(),
            tuple(ids),
            tuple(keys),
            read_bytes,
            part.variants,
        )

    def _spanned(self, part: Slice) -> Iterator[tuple[int, int, int, pa.Table, Group]]:
        """The pieces with rows of the shard: its first row and last in each, and the piece."""
        if part.rows:
            by_row = {start: (start, table, group) for start, table, group in self.pieces}
            yield from ((row, row + 1, *by_row[row]) for row in part.rows)
            return
        for start, table, group in self.pieces:
            low, high = max(part.first_row, start), min(part.stop_row, start + table.num_rows)
            if low < high:
                yield low, high, start, table, group


class CountingFile(WrappedFile):
    """A seekable binary file that counts the bytes read through it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._count = 0

    def take(self) -> int:
        """Return the bytes read since the last call."""
        count, self._count = self._count, 0
        return count

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self._count += len(data)
        return data
