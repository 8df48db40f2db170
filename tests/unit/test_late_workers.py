"""A worker that finishes after its shard was committed changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output import ledger as ledger_module
from batchgen.output.formats import FORMATS
from batchgen.output.ledger import SHARD_FOLDERS, Ledger
from batchgen.output.marker import Written
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.shard.work import Trial
from batchgen.storage import open_store
from tests.arithmetic_stages import arithmetic_stages, make_output
from tests.datasets_on_disk import plan_for, write_prompts


def late(plan: Plan, ledger: Ledger, shard: int, without: Mapping[str, str]) -> object:
    """Another attempt at the shard, with fewer accepted samples."""
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    (span,) = make_spans(plan, [shard])
    (rows,) = read_span(span, plan.spec, columns)
    return arithmetic_stages()(rows, plan, ledger, 2, Trial(without=without))


@pytest.mark.parametrize("form", FORMATS)
def test_a_late_worker_looks_before_it_writes(form: str, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 6)
    plan = plan_for(path, tmp_path / "out", output__samples_per_shard=3, output__format=form)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    first = make_output(plan, ledger)[1]
    before = {one: one.read_bytes() for one in (tmp_path / "out").rglob("*") if one.is_file()}
    without = {f"a-{row:08d}-v0": "its web server answers 503" for row in (3, 4, 5)}
    assert late(plan, ledger, 1, without) == first
    after = {one: one.read_bytes() for one in (tmp_path / "out").rglob("*") if one.is_file()}
    assert after == before
    assert verify(ledger).problems == []


def test_a_late_commit_removes_its_files_from_every_folder_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "SHARD_FOLDERS", (*SHARD_FOLDERS, "masks"))
    plan = plan_for(write_prompts(tmp_path / "a.parquet", 3), tmp_path / "out")
    ledger = Ledger(open_store(str(tmp_path / "out")))
    (first,) = make_output(plan, ledger)
    shared = "_batchgen/schemas/00000.bin"
    more = tuple(Written(name, 1, "0" * 64, 1) for name in ("masks/00000.bin", shared))
    for one in more:
        ledger.store.put(one.name, b"x")
    assert ledger.commit(replace(first, files=(*first.files, *more))) == first
    assert ledger.store.list("masks") == {}
    assert ledger.store.read(shared) == b"x"


def test_without_the_marker_the_later_attempt_is_what_counts(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 6)
    plan = plan_for(path, tmp_path / "out", output__samples_per_shard=3)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    (tmp_path / "out/_batchgen/shards/00001.json").write_bytes(b"{")
    late(plan, ledger, 1, {"a-00000004-v0": "broken"})
    marker = ledger.marker(1)
    assert marker is not None and marker.counts.failed == 1
