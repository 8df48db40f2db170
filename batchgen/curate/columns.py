"""The columns of an output and of its score sets without images, as one table for DuckDB."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from batchgen.curate.score_sets import Scored, score_sets
from batchgen.errors import InputError, SpecError, nearest
from batchgen.output.find import contents
from batchgen.output.formats import UNREADABLE, format_of
from batchgen.output.formats.parquet import Parquet
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.score_set import KEY, content_of
from batchgen.plan.plan import Plan

IMAGES = ("image", "label_mask")  # columns of files, which no condition reads
VIEW = "samples"
MEMORY = "640MB"  # of DuckDB; with Python and Arrow a process stays under 1 GB
_UNREAD = "reading the stream registered as "  # how DuckDB tells Arrow's error
_ANY_COLUMN = re.compile(r"\*|\bcolumns\s*\(", re.IGNORECASE)


@dataclass(frozen=True)
class Joined:
    """One score set in the table: its dataset, and its columns -> their names in the table."""

    scored: Scored
    table: Any
    names: dict[str, str]


@dataclass(frozen=True)
class Columns:
    """The columns of all accepted samples of an output, joined with its score sets by key.

    Attributes:
        url: of the output.
        output: an Arrow dataset or table of the output's own columns.
        joined: its complete score sets.
        left_out: the incomplete ones, whose columns are not in the table.
        vectors: columns that DuckDB cannot read, such as embeddings.
        contents: a fingerprint of all committed shards.
        shards: their number.
    """

    url: str
    output: Any
    joined: tuple[Joined, ...] = ()
    left_out: tuple[Scored, ...] = ()
    vectors: tuple[str, ...] = ()
    contents: str = ""
    shards: int = 0

    @property
    def names(self) -> list[str]:
        """The columns that a condition may read."""
        added = [name for one in self.joined for name in one.names.values()]
        return [*self.output.schema.names, *added]

    def query(self, sql: str, mentions: Iterable[str] = ()) -> pa.Table:
        """The result of a query over the view ``samples``.

        Args:
            sql: the query.
            mentions: the texts of the user in it: score sets none of whose columns they name are
                not read. None of them: all sets are.

        Raises:
            InputError: it cannot be evaluated, or the data cannot be read.
        """
        duckdb = _duckdb()
        with duckdb.connect(config={"threads": 2, "memory_limit": MEMORY}) as database:
            database.execute("SET enable_external_access = false")
            self._register(database, self._needed(list(mentions)))
            database.execute("SET lock_configuration = true")
            try:
                return database.sql(sql).to_arrow_table()
            except duckdb.Error as error:
                raise self._refused(error) from error

    def used(self, mentions: Iterable[str]) -> dict[str, str]:
        """Name -> fingerprint of the score sets that a query with these texts reads."""
        needed = self._needed(list(mentions))
        return {one.scored.name: one.scored.record.fingerprint for one in needed}

    def require(self, names: Iterable[str], option: str) -> None:
        """Raise SpecError for a name that is no column; ``option`` is where it was given."""
        known = self.names
        for name in names:
            if name not in known:
                allowed = f"columns: {', '.join(known)}{nearest(name, known)}{self._hints()}"
                raise SpecError(option, name, allowed)

    def _needed(self, mentions: list[str]) -> list[Joined]:
        text = "\n".join(mentions).lower()
        if not mentions or _ANY_COLUMN.search(text):
            return list(self.joined)
        return [
            one for one in self.joined if any(name.lower() in text for name in one.names.values())
        ]

    def _register(self, database: Any, joined: Sequence[Joined]) -> None:
        database.register("output", self.output)
        columns, tables = ["o.*"], ["output o"]
        for number, one in enumerate(joined):
            database.register(f"scores_{number}", one.table)
            columns += [
                f"s{number}.{quoted(name)} as {quoted(shown)}" for name, shown in one.names.items()
            ]
            tables.append(f"left join scores_{number} s{number} on o.key = s{number}.key")
        database.execute(
            f"create view {VIEW} as select {', '.join(columns)} from {' '.join(tables)}"
        )

    def _refused(self, error: Exception) -> InputError:
        """DuckDB's error, without the query."""
        first = str(error).partition("\n")[0]
        if _UNREAD in first:
            told = first.partition(_UNREAD)[2].partition("failed: ")[2]
            return InputError(
                f"{self.url} cannot be read ({told}); see `batchgen verify {self.url}`"
            )
        return InputError(
            f"the selection cannot be evaluated: {first}; the columns are "
            f"{', '.join(self.names)}{self._hints()}"
        )

    def _hints(self) -> str:
        """Where else a column may be that is not found."""
        told = [
            f"; score set {one.name} is not complete ({one.done:,} of {one.shards:,} shards): "
            f"`batchgen score {self.url} --name {one.name}` completes it"
            for one in self.left_out
        ]
        if self.vectors:
            told.append(f"; conditions cannot read vectors: {', '.join(self.vectors)}")
        return "".join(told)


def columns_of(ledger: Ledger) -> Columns:
    """The accepted samples of all committed shards, with the scores of all complete score sets.

    Of Parquet files only the columns that a query asks for are read. A column whose name is taken
    by the output or an earlier set is called ``SET.column``.

    Raises:
        InputError: nothing is committed.
    """
    parts = [(plan, _committed(ledger, plan)) for plan in ledger.parts()]
    markers = [marker for _, some in parts for marker in some]
    if not markers:
        raise InputError(f"{ledger.store.url} has no committed shard yet")
    found, vectors = _readable(
        _together([_part(ledger, plan, some) for plan, some in parts if some])
    )
    sets = score_sets(ledger, markers)
    # DuckDB compares names without case: the second of two such columns could not be read.
    taken, joined = {one.lower() for one in (*found.schema.names, *IMAGES, *vectors)}, []
    for one in sets:
        if one.complete:
            table, unread = _readable(_dataset(ledger, one.files))
            own = [name for name in table.schema.names if name != KEY]
            names = {name: f"{one.name}.{name}" if name.lower() in taken else name for name in own}
            taken |= {name.lower() for name in names.values()}
            vectors += unread
            joined.append(Joined(one, table, names))
    left_out = tuple(one for one in sets if not one.complete)
    return Columns(
        ledger.store.url,
        found,
        tuple(joined),
        left_out,
        tuple(vectors),
        contents_of(markers),
        len(markers),
    )


def contents_of(markers: Iterable[Marker]) -> str:
    """A fingerprint of the files of all these shards."""
    digest = hashlib.sha256()
    for marker in sorted(markers, key=lambda one: one.shard):
        digest.update(f"{marker.shard} {content_of(marker)}\n".encode())
    return digest.hexdigest()


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _committed(ledger: Ledger, plan: Plan) -> list[Marker]:
    return list(ledger.markers(ledger.states(plan).committed))


def _part(ledger: Ledger, plan: Plan, markers: list[Marker]) -> Any:
    """The columns of one part of the output: a dataset, or a table if the format has to be read."""
    form = format_of(plan)
    if isinstance(form, Parquet):
        names = [file.name for one in markers for file in one.files if form.is_ours(file.name)]
        return _dataset(ledger, names)
    return pa.concat_tables(_tables(ledger, plan, markers), promote_options="permissive")


def _dataset(ledger: Ledger, names: Sequence[str]) -> Any:
    store, paths = ledger.store, [ledger.store.path(name) for name in names]
    try:
        return ds.dataset(paths, filesystem=store.fs, format="parquet")
    except UNREADABLE as error:
        raise InputError(
            f"{store.url} cannot be read ({error}); see `batchgen verify {store.url}`"
        ) from error


def _together(parts: list[Any]) -> Any:
    """The parts one after the other; a column that one of them lacks is null there."""
    if len(parts) == 1:
        return parts[0]
    schema = pa.unify_schemas([one.schema for one in parts], promote_options="permissive")
    if all(isinstance(one, ds.Dataset) for one in parts):
        return ds.dataset([one.replace_schema(schema) for one in parts])
    tables = [one.to_table() if isinstance(one, ds.Dataset) else one for one in parts]
    return pa.concat_tables(tables, promote_options="permissive")


def _readable(table: Any) -> tuple[Any, list[str]]:
    """Without columns of images, and without those of types that DuckDB does not know."""
    vectors = [field.name for field in table.schema if _is_unknown(field.type)]
    kept = [one for one in table.schema if one.name not in (*IMAGES, *vectors)]
    if isinstance(table, pa.Table):
        return table.select([one.name for one in kept]), vectors
    return table.replace_schema(pa.schema(kept)), vectors


def _is_unknown(kind: pa.DataType) -> bool:
    """Whether a type has half-precision numbers in it."""
    if pa.types.is_nested(kind):
        return any(_is_unknown(kind.field(place).type) for place in range(kind.num_fields))
    return bool(pa.types.is_float16(kind))


def _tables(ledger: Ledger, plan: Plan, markers: list[Marker]) -> Iterator[pa.Table]:
    """One table for each shard of an output whose format has to be read as a whole."""
    form = format_of(plan)
    for marker in markers:
        files = dict(contents(ledger, marker))
        names = [name for name in form.schema(files).names if name not in IMAGES]
        yield form.read(files, names)


def _duckdb() -> Any:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise InputError("select needs DuckDB: `pip install 'batchgen[curate]'`") from error
    return duckdb
