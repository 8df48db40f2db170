"""The columns of an output without its images, as one table that DuckDB can query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from batchgen.errors import InputError
from batchgen.output.find import contents
from batchgen.output.formats import format_of
from batchgen.output.formats.parquet import Parquet
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.plan.plan import Plan

IMAGES = ("image", "label_mask")  # columns of files, which no condition reads


def columns_of(ledger: Ledger, plan: Plan) -> Any:
    """The accepted samples of all committed shards: an Arrow dataset or table without images.

    Of Parquet files only the columns that a query asks for are read.

    Raises:
        InputError: nothing is committed.
    """
    form = format_of(plan)
    markers = list(ledger.markers(ledger.states(plan).committed))
    if not markers:
        raise InputError(f"{ledger.store.url} has no committed shard yet")
    if isinstance(form, Parquet):
        store = ledger.store
        names = [file.name for one in markers for file in one.files if form.is_ours(file.name)]
        found = ds.dataset([store.path(name) for name in names], filesystem=store.fs)
        kept = [field for field in found.schema if field.name not in IMAGES]
        return found.replace_schema(pa.schema(kept))
    return pa.concat_tables(_tables(ledger, plan, markers))


def _tables(ledger: Ledger, plan: Plan, markers: list[Marker]) -> Iterator[pa.Table]:
    """One table for each shard of an output whose format has to be read as a whole."""
    form = format_of(plan)
    for marker in markers:
        files = dict(contents(ledger, marker))
        names = [name for name in form.schema(files).names if name not in IMAGES]
        yield form.read(files, names)
