"""Splits: rows that are held out are not used as sources, and the user is told of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError, SpecError
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import begin
from batchgen.output.rejects import by_reason
from batchgen.output.verify import verify
from batchgen.spec.splits import is_held_out, is_wanted
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for
from tests.outputs import table_of

SPLITS = ["train", "test", "training", "val", None, "train"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    prompts = [f"p{number}" for number in range(len(SPLITS))]
    table = pa.table({"prompt": prompts, "split": SPLITS, "part": SPLITS[::-1]})
    pq.write_table(table, tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_the_names_of_splits() -> None:
    assert [name for name in SPLITS if is_held_out(name)] == ["test", "val"]
    assert is_wanted("val", ["validation"]) and is_wanted("fold-3", ["fold-3"])
    assert not is_wanted(None, ["train"]) and not is_wanted("fold-3", ["train"])


def test_only_rows_of_the_listed_splits_are_sources(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source, tmp_path / "out", input__splits=["train"], resources__batch_size=2)
    assert not plan.notes
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    table = table_of(tmp_path / "out")
    assert table.column("split").to_pylist() == ["train", "training", "train"]
    (group,) = by_reason(ledger, None, None)
    assert (group.reason, group.count) == ("other-split", 3)
    assert "its split is 'test'; input.splits allows train" in group.samples[0].message
    assert verify(ledger).ok
    tally, _ = begin(plan, ledger, None, print)
    assert (tally.rejected, tally.refused, tally.above_limits) == (3, 0, False)


def test_another_column_may_say_the_split(source: Path, tmp_path: Path) -> None:
    columns = {"input__columns__split": "part", "input__splits": ["validation"]}
    plan = plan_for(source, tmp_path / "out", **columns, resources__batch_size=2)
    make_output(plan, Ledger(open_store(str(tmp_path / "out"))))
    assert table_of(tmp_path / "out").column("prompt").to_pylist() == ["p2"]


def test_held_out_rows_are_told_of_before_the_run(source: Path, tmp_path: Path) -> None:
    (note,) = plan_for(source, tmp_path / "out").notes
    assert "(1 of test, 1 of val)" in note and "input.splits=[train]" in note
    pq.write_table(pa.table({"prompt": ["a"], "split": ["test"]}), source)
    assert not plan_for(source, tmp_path / "out").notes  # all rows: they were chosen


def test_a_column_that_is_missing_or_idle(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"input\.splits is not set"):
        plan_for(source, tmp_path / "out", input__columns__split="part")
    pq.write_table(pa.table({"prompt": ["a"]}), source)
    with pytest.raises(InputError, match=r"input\.splits: .* has no column 'split'"):
        plan_for(source, tmp_path / "out", input__splits=["train"])
    pq.write_table(pa.table({"prompt": ["a"], "split": [1]}), source)
    with pytest.raises(InputError, match=r"column 'split' .* has type int64; needed: text"):
        plan_for(source, tmp_path / "out", input__splits=["train"])
    with pytest.raises(SpecError, match=r"input\.splits"):
        plan_for(source, tmp_path / "out", input__splits=[])
