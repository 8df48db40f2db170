"""Lists and maps of the input verify in every format: Parquet gives their elements other names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.output.export import export
from batchgen.output.formats import FORMATS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts

ROWS = 3
NESTED = {
    "tags": pa.list_(pa.field("array", pa.string())),
    "boxes": pa.list_(pa.list_(pa.field("item", pa.float64()))),
    "counts": pa.map_(pa.string(), pa.int64()),
    "seed": pa.map_(pa.string(), pa.int64()),  # gets another name, and so do its entries
    "both": pa.struct([("all", pa.large_list(pa.int8()))]),
}
VALUES = {
    "tags": ["a", "b"],
    "boxes": [[0.5, 1.0], []],
    "counts": [("x", 1)],
    "seed": [("y", 2)],
    "both": {"all": [1]},
}


@pytest.mark.parametrize("form", FORMATS)
def test_they_verify_and_are_exported(form: str, tmp_path: Path) -> None:
    columns = {name: pa.array([VALUES[name]] * ROWS, kind) for name, kind in NESTED.items()}
    numbers = np.arange(ROWS * 4.0).reshape(ROWS, 2, 2)
    columns["tensor"] = pa.FixedShapeTensorArray.from_numpy_ndarray(numbers)
    path = tmp_path / "nested.parquet"
    pq.write_table(pa.table({"prompt": prompts(ROWS), **columns}), path)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan_for(path, tmp_path / "out", output__format=form), ledger)
    assert verify(ledger).problems == []
    for other in set(FORMATS) - {form}:
        target = open_store(str(tmp_path / other))
        export(ledger, target, other)
        assert verify(Ledger(target)).problems == []
