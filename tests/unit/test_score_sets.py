"""Score sets: stored per shard beside a finished output, and read with its columns by key."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from batchgen.cli import main
from batchgen.curate.columns import columns_of
from batchgen.curate.score_sets import score_sets, shards_of, store_scores
from batchgen.curate.selection import Query, select, selected_keys, stored_selections
from batchgen.errors import (
    DamagedRecord,
    InputError,
    NewerFormat,
    OutputBusy,
    PlanChanged,
    SpecError,
)
from batchgen.output.clean import clean
from batchgen.output.find import keys_of
from batchgen.output.formats import format_of
from batchgen.output.holdings import holdings_of, remove_output
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger
from batchgen.output.repair import repair
from batchgen.output.score_set import (
    commit_scores,
    content_of,
    files_of,
    lease_folder,
    ledger_of,
    read_set,
    scores_of,
    set_names,
    withdraw,
)
from batchgen.output.verify import verify
from batchgen.stages.scorers.scorer import ScoreColumn
from batchgen.storage import open_store
from tests.unit.test_selection import COUNT, FORMATS, numbers, output_of

TWICE = ScoreColumn("twice", pa.int64(), "two times the row's number")
HASH = ScoreColumn("phash", pa.uint64(), "a hash")
VECTOR = ScoreColumn("embedding", pa.list_(pa.float16(), 4), "a vector")


def keys(ledger: Ledger) -> list[str]:
    return [
        key
        for plan, marker in shards_of(ledger)
        for key in keys_of(ledger, format_of(plan), marker)
    ]


def table(ledger: Ledger, *columns: ScoreColumn) -> pa.Table:
    """Scores of all samples, in another order than the output's."""
    found = keys(ledger)
    rows = [int(key.removesuffix("-v0").rpartition("-")[2]) for key in found]
    values = {
        "twice": pa.array([2 * row for row in rows], pa.int64()),
        "phash": pa.array([2**63 + row for row in rows], pa.uint64()),
        "embedding": pa.array([np.full(4, row, np.float16) for row in rows], VECTOR.kind),
    }
    kept = {column.name: values[column.name] for column in columns}
    return pa.table({"key": found, **kept}).take(np.random.default_rng(0).permutation(len(found)))


def stored(ledger: Ledger, name: str, *columns: ScoreColumn) -> None:
    store_scores(ledger, name, table(ledger, *columns), columns, "f" * 64)


@pytest.fixture(params=FORMATS)
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    return output_of(tmp_path, request.param)


def test_scores_are_selected_by_in_every_format(ledger: Ledger) -> None:
    stored(ledger, "numbers", TWICE)
    stored(ledger, "hashes", HASH, VECTOR)
    (hashes, first) = sorted(score_sets(ledger), key=lambda one: one.name)
    assert first.complete and hashes.complete and (first.done, first.shards) == (3, 3)
    found = select(ledger, ledger.require_plan(), "high", Query("twice >= 14 and number <> 8"))
    assert (found.selected, found.samples) == (4, COUNT)
    assert numbers(ledger, "high") == {7, 9, 10, 11}
    query = Query(f"phash > {2**63}", top=2, by="twice", per=("label",))
    select(ledger, ledger.require_plan(), "best", query)
    assert numbers(ledger, "best") == {9, 6, 10, 7, 11, 8}
    assert verify(ledger).ok


def test_the_rows_of_a_shard_are_in_the_order_of_its_samples(ledger: Ledger) -> None:
    stored(ledger, "numbers", TWICE)
    own = ledger_of(ledger, "numbers")
    for plan, marker in shards_of(ledger):
        scores = own.marker(marker.shard)
        assert scores is not None and scores.spec_fingerprint == "f" * 64
        found = scores_of(ledger, scores)
        assert found.column("key").to_pylist() == keys_of(ledger, format_of(plan), marker)


def test_columns_of_two_sets_and_of_the_output_do_not_hide_each_other(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "one", TWICE)
    stored(ledger, "two", TWICE, HASH)
    seed = ScoreColumn("number", pa.int64(), "also a column of the output")
    rows = table(ledger, TWICE).rename_columns(["key", "number"])
    store_scores(ledger, "three", rows, [seed], "f")
    columns = columns_of(ledger)
    assert columns.names[-4:] == ["twice", "two.twice", "phash", "three.number"]
    sql = 'select count(*) as n from samples where twice = "two.twice" and "three.number" = twice'
    assert columns.query(sql).to_pylist() == [{"n": COUNT}]


def test_a_set_is_read_only_if_a_condition_names_a_column_of_it(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    shutil.rmtree(tmp_path / "out/_batchgen/scores/numbers/data")
    with pytest.raises(InputError, match="twice"):  # and now it is not complete
        select(ledger, ledger.require_plan(), "some", Query("twice > 2"))
    stored(ledger, "numbers", TWICE)
    for path in (tmp_path / "out/_batchgen/scores/numbers/data").iterdir():
        path.write_bytes(b"no table")
    with pytest.raises(InputError, match="verify"):
        select(ledger, ledger.require_plan(), "some", Query("twice > 2"))


def test_vectors_are_kept_and_conditions_that_name_them_are_refused(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "vectors", VECTOR)
    assert columns_of(ledger).vectors == ("embedding",)
    with pytest.raises(InputError, match="conditions cannot read vectors: embedding"):
        select(ledger, ledger.require_plan(), "some", Query("embedding[1] > 0"))
    (scored,) = score_sets(ledger)
    assert scored.record.columns[0].type == "list<halffloat>[4]"


def test_a_set_of_an_output_that_changed_is_not_complete(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    marker = ledger.marker(1)
    assert marker is not None
    ledger.withdraw(1)
    changed = marker.to_json().replace(marker.files[0].sha256.encode(), b"0" * 64)
    ledger.store.put("_batchgen/shards/00001.json", changed)
    (scored,) = score_sets(ledger)
    assert (scored.done, scored.complete) == (2, False)
    with pytest.raises(InputError, match=r"score set numbers is not complete \(2 of 3 shards\)"):
        select(ledger, ledger.require_plan(), "some", Query("twice > 2"))
    with pytest.raises(SpecError, match=r"score set numbers is not complete"):
        select(ledger, ledger.require_plan(), "some", Query(top=1, by="number", per=("twice",)))


def test_what_does_not_cover_the_output_is_refused(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    rows = table(ledger, TWICE)
    with pytest.raises(InputError, match="the scores have no row of sample"):
        store_scores(ledger, "some", rows.slice(1), [TWICE], "f")
    twice = pa.concat_tables([rows, rows.slice(3, 2)])
    with pytest.raises(InputError, match="2 rows more than the output has samples"):
        store_scores(ledger, "some", twice, [TWICE], "f")
    assert set_names(ledger) == []


def test_a_set_made_by_scorers_is_not_replaced(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    stored(ledger, "numbers", HASH)  # its own may be
    assert columns_of(ledger).names[-1] == "phash"
    path = tmp_path / "out/_batchgen/scores/numbers/scores.json"
    path.write_text(path.read_text().replace('"scorers": []', '"scorers": [{"scorer": "phash"}]'))
    with pytest.raises(InputError, match="made by `batchgen score`"):
        stored(ledger, "numbers", TWICE)


def test_a_damaged_or_newer_record_is_named(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    path = tmp_path / "out/_batchgen/scores/numbers/scores.json"
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(DamagedRecord, match=r"numbers/scores\.json is damaged"):
        read_set(ledger, "numbers")
    path.write_text(whole.replace('"version": 1', '"version": 99'))
    with pytest.raises(NewerFormat, match="newer batchgen"):
        read_set(ledger, "numbers")
    assert score_sets(ledger) == []  # the other columns can be selected by


def test_two_processes_do_not_mix_their_scores(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    record, marker = read_set(ledger, "numbers"), ledger.marker(0)
    assert record is not None and marker is not None
    table = pa.table({"key": ["a"] * 4, "twice": [0] * 4})
    with pytest.raises(PlanChanged, match="another process stores it"):
        commit_scores(ledger, replace(record, fingerprint="another"), marker, table)
    held = hold_lease(ledger.store, lambda words: None, folder=lease_folder("numbers"))
    with held, pytest.raises(OutputBusy):
        stored(ledger, "numbers", TWICE)


def test_columns_that_differ_only_in_case_are_told_apart(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    columns = columns_of(ledger)
    name = columns.output.schema.names[1].upper()
    rows = ledger.marker(0), ledger.marker(1)
    assert all(rows)
    keys = columns.query("select key from samples")["key"]
    column = ScoreColumn(name, pa.int64(), "always below zero")
    store_scores(ledger, "low", pa.table({"key": keys, name: [-1] * len(keys)}), [column], "x")
    joined = columns_of(ledger)
    assert f"low.{name}" in joined.names
    found = joined.query(f'select count(*) as n from samples where "low.{name}" < 0')
    assert found["n"].to_pylist() == [len(keys)]


def test_scores_are_committed_once(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    record, marker = read_set(ledger, "numbers"), ledger.marker(0)
    assert record is not None and marker is not None
    first = ledger_of(ledger, "numbers").marker(0)
    other = pa.table({"key": ["a"] * 4, "twice": [0] * 4})
    assert commit_scores(ledger, record, marker, other) == first
    assert files_of(ledger, "numbers").has(marker)
    assert first is not None and content_of(marker)[:12] in first.files[0].name


def test_overwrite_removes_score_sets(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    own = holdings_of(ledger).own
    files = [name for name in own if name.startswith("_batchgen/scores/numbers/")]
    assert len(files) == 8  # one of them is a lease
    remove_output(ledger)
    assert set_names(ledger) == []


def test_verify_finds_damaged_scores_and_repair_withdraws_them(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    assert verify(ledger).ok and verify(ledger, quick=True).ok
    own = ledger_of(ledger, "numbers")
    first, second = own.marker(0), own.marker(1)
    assert first is not None and second is not None
    whole = ledger.store.read(first.files[0].name)
    ledger.store.put(first.files[0].name, whole[:-1] + b"?")
    ledger.store.delete(second.files[0].name)
    assert [flaw.shard for flaw in verify(ledger, quick=True).flaws] == [1]
    found = verify(ledger)
    assert [flaw.shard for flaw in found.flaws] == [0, 1]
    assert "batchgen score" in found.sentence("out")
    mended = repair(ledger)
    assert mended.exit_code == 3 and "score set numbers" in mended.lines()[0]
    assert verify(ledger).ok and files_of(ledger, "numbers").marked == {2}


def test_verify_finds_scores_of_other_samples(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    own, record = ledger_of(ledger, "numbers"), read_set(ledger, "numbers")
    source, files = ledger.marker(0), files_of(ledger, "numbers")
    assert record is not None and source is not None
    rows = next(iter(own.markers([0])))
    swapped = scores_of(ledger, rows).take(pa.array([1, 0, 2, 3]))
    withdraw(ledger, files, 0)
    commit_scores(ledger, record, source, swapped)
    assert "keys are not those" in verify(ledger).problems[0]
    withdraw(ledger, files, 0)
    commit_scores(ledger, replace(record, fingerprint="other"), source, swapped)
    assert "other scorers" in verify(ledger, quick=True).problems[0]
    (tmp_path / "out/_batchgen/scores/numbers/scores.json").write_text("{")
    assert "scores.json is damaged" in verify(ledger).problems[0]


def test_a_selection_by_scores_is_stale_when_they_were_made_otherwise(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    stored(ledger, "hashes", HASH)
    select(ledger, ledger.parts(), "some", Query("twice > 6"))
    stored(ledger, "hashes", TWICE)  # a set that the query does not read
    assert selected_keys(ledger, ledger.parts(), "some")
    store_scores(ledger, "numbers", table(ledger, TWICE), [TWICE], "other settings")
    with pytest.raises(InputError, match="its score set numbers was made again"):
        selected_keys(ledger, ledger.parts(), "some")
    shutil.rmtree(tmp_path / "out/_batchgen/scores/numbers")
    assert "numbers was removed" in stored_selections(ledger)[0].stale


def test_clean_waits_for_runs_that_score(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE)
    with (
        hold_lease(ledger.store, print, folder=lease_folder("numbers")),
        pytest.raises(OutputBusy, match="score set numbers"),
    ):
        clean(ledger)
    assert clean(ledger).temporary_files == ()


def test_an_export_has_the_scores_of_its_samples(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    stored(ledger, "numbers", TWICE, VECTOR)
    select(ledger, ledger.parts(), "some", Query("twice >= 6 and number <> 8"))
    for target, words in (("all", ()), ("part", ("--selection", "some"))):
        command = ["export", ledger.store.url, str(tmp_path / target), "--format", "webdataset"]
        for _ in range(2):  # the second has nothing to do
            result = CliRunner().invoke(main, [*command, *words])
            assert result.exit_code == 0 and "score sets: numbers" in result.output, result.output
    copy = Ledger(open_store(str(tmp_path / "part")))
    assert [one.complete for one in score_sets(copy)] == [True]
    found = columns_of(copy).query("select key, twice, number from samples order by key")
    assert [row["twice"] for row in found.to_pylist()] == [6, 8, 10, 12, 14, 18, 20, 22]
    assert all(row["twice"] == 2 * row["number"] for row in found.to_pylist())
    checked = verify(copy)
    assert checked.ok, checked.problems
