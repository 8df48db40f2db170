"""Random tables in every format and export, read back by a reader without batchgen."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.output.export import export
from batchgen.output.formats import FORMATS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests import oracle
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_table
from tests.fuzzing import fuzz
from tests.unit.test_json_values import TEXT

KINDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.string(), TEXT),
    (pa.string_view(), TEXT),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.bool_(), st.booleans()),
    (pa.binary(), st.binary(max_size=4)),
    (pa.list_(pa.string()), st.lists(TEXT, max_size=2)),
    (pa.float64(), st.floats(allow_nan=False, allow_infinity=False)),
]
NUMBERED = [pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.date32(), pa.duration("ms")]


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pa.Array:
    """A column of any type, nulls in it."""
    if draw(st.booleans()):
        kind = draw(st.sampled_from(NUMBERED))
        stored, most = (pa.int32(), 2**31 - 1) if kind.bit_width == 32 else (pa.int64(), 2**63 - 1)
        numbers = st.lists(st.none() | st.integers(-most, most), min_size=rows, max_size=rows)
        return pa.array(draw(numbers), stored).view(kind)
    kind, one = draw(st.sampled_from(KINDS))
    return pa.array(draw(st.lists(st.none() | one, min_size=rows, max_size=rows)), kind)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(1, 4))
    keys = draw(st.lists(TEXT, min_size=rows, max_size=rows, unique=True))
    words = draw(st.lists(st.none() | TEXT | st.just("flat x"), min_size=rows, max_size=rows))
    return pa.table(
        {
            "prompt": pa.array(words, pa.string()),
            "name": pa.array(keys, pa.string()),
            "kind": draw(columns(rows)),
            "more": draw(columns(rows)),
        }
    )


LATE = pa.array([None, 288_228_475_350_401_023], pa.timestamp("us"))  # in the year 11103
TWO = {"prompt": ["a\u0085\u2028c", "b"], "name": ["c", "d"], "kind": LATE, "more": LATE}


@fuzz(quick=12, slow=2000)
@example(pa.table(TWO), "parquet", False, 1)
@example(pa.table(TWO), "image-folder", True, 2)
@given(tables(), st.sampled_from(sorted(FORMATS)), st.booleans(), st.integers(1, 2))
def test_an_output_is_the_same_in_every_format(
    table: pa.Table, form: str, keyed: bool, variants: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = write_table(folder / "in/a.parquet", table)
        assert pq.read_metadata(path).num_rows == table.num_rows
        more = {"input__columns__key": "name"} if keyed else {}
        plan = plan_for(
            path,
            folder / "out",
            variants=variants,
            input__columns__label="kind",
            output__samples_per_shard=3,
            output__format=form,
            **more,
        )
        source = Ledger(open_store(str(folder / "out")))
        make_output(plan, source)
        found = verify(source)
        assert found.problems == []
        seen = oracle.read(folder / "out")
        assert len(seen) == found.accepted
        for other in sorted(FORMATS):
            target = open_store(str(folder / other))
            export(source, target, other)
            assert verify(Ledger(target)).problems == []
            again = oracle.read(folder / other)
            assert oracle.own_columns(again) == oracle.own_columns(seen)
            if other == form:
                assert again == seen
