"""Verification finds every kind of damage and passes undamaged outputs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.output.formats import parquet_bytes
from batchgen.output.ledger import REJECTS, Ledger, data_name
from batchgen.output.planned import names_of
from batchgen.output.verify import MAX_PROBLEMS, Findings, verify
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts, write_columns

SHARDS = 4
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 shards of 6 samples (12 rows, 2 variants); rows 1, 5 and 6 are dropped."""
    folder = tmp_path_factory.mktemp("whole")
    texts: list[str] = prompts(12)
    texts[1], texts[5], texts[6] = "", "flat picture", "broken picture"
    path = write_columns(folder / "in/a.parquet", {"prompt": texts})
    plan = plan_for(path, folder / "out", variants=2, output__samples_per_shard=6)
    make_output(plan, Ledger(open_store(str(folder / "out"))))
    return folder / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def findings(out: Path, quick: bool = False) -> Findings:
    return verify(Ledger(open_store(str(out))), quick)


def data_path(out: Path, shard: int) -> Path:
    return out / data_name(shard, SHARDS)


def marker_path(out: Path, shard: int) -> Path:
    return out / f"_batchgen/shards/{shard:05d}.json"


def rejects_path(out: Path, shard: int) -> Path:
    return out / f"{REJECTS}/{shard:05d}.parquet"


def edit_marker(out: Path, shard: int, change: Callable[[Tree], None]) -> None:
    tree = json.loads(marker_path(out, shard).read_bytes())
    change(tree)
    marker_path(out, shard).write_text(json.dumps(tree))


def mark_again(out: Path, shard: int, table: pa.Table, counts: Tree | None = None) -> None:
    """Replace a data file and make its marker agree with the new one."""
    data = parquet_bytes(table)
    data_path(out, shard).write_bytes(data)

    def agree(tree: Tree) -> None:
        digest = hashlib.sha256(data).hexdigest()
        facts = {"bytes": len(data), "sha256": digest, "rows": table.num_rows}
        tree["files"][0].update(facts)
        tree["counts"].update(counts or {})

    edit_marker(out, shard, agree)


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(index)
    return table.set_column(index, field, pa.array(values, field.type))


def test_the_untouched_output_verifies(whole: Path) -> None:
    found = findings(whole)
    assert found.problems == []
    assert found.ok
    totals = {
        "shards": 4,
        "planned": 24,
        "committed": 4,
        "pending": 0,
        "failed_shards": 0,
        "accepted": 18,
        "rejected": 4,
        "failed": 2,
    }
    assert {name: asdict(found)[name] for name in totals} == totals
    on_disk = [*(whole / "data").iterdir(), *(whole / REJECTS).iterdir()]
    assert found.bytes == sum(path.stat().st_size for path in on_disk)


def test_quick_counts_the_same(whole: Path) -> None:
    quick, full = asdict(findings(whole, quick=True)), asdict(findings(whole))
    assert quick.pop("skipped") == ["everything but listings and markers"]
    assert full.pop("skipped") == []
    assert quick == full


def test_planned_samples_are_the_plans_arithmetic(whole: Path) -> None:
    plan = Ledger(open_store(str(whole))).require_plan()
    names = names_of(plan, 1)
    both = [(row, variant) for row in (3, 4, 5) for variant in (0, 1)]
    assert names.sources.to_pylist() == [f"a.parquet#{row}" for row, _ in both]
    assert names.variants.to_pylist() == [variant for _, variant in both]
    assert names.keys is not None
    assert names.keys.to_pylist() == [f"a-{row:08d}-v{variant}" for row, variant in both]


def delete_data(out: Path) -> None:
    data_path(out, 2).unlink()


def delete_rejects(out: Path) -> None:
    rejects_path(out, 1).unlink()


def truncate(out: Path) -> None:
    data_path(out, 0).write_bytes(data_path(out, 0).read_bytes()[:-1])


def truncate_rejects(out: Path) -> None:
    rejects_path(out, 0).write_bytes(b"")


def add_data_file(out: Path) -> None:
    shutil.copy(data_path(out, 0), out / "data/extra.parquet")


def add_data_of_another_plan(out: Path) -> None:
    shutil.copy(data_path(out, 0), out / data_name(0, SHARDS + 1))


def add_rejects(out: Path) -> None:
    shutil.copy(rejects_path(out, 0), rejects_path(out, 77))


def add_rejects_to_a_shard_without(out: Path) -> None:
    shutil.copy(rejects_path(out, 0), rejects_path(out, 3))


def delete_marker(out: Path) -> None:
    marker_path(out, 3).unlink()


def empty_marker(out: Path) -> None:
    marker_path(out, 3).write_bytes(b"")


def copy_marker(out: Path) -> None:
    shutil.copy(marker_path(out, 0), marker_path(out, 2))


def add_marker(out: Path) -> None:
    shutil.copy(marker_path(out, 3), marker_path(out, 9))


def count_fewer(out: Path) -> None:
    edit_marker(out, 1, lambda tree: tree["counts"].update(accepted=3))


def count_consistently_wrong(out: Path) -> None:
    edit_marker(out, 1, lambda tree: tree["counts"].update(accepted=3, rejected=3))


def count_another_plan(out: Path) -> None:
    edit_marker(out, 1, lambda tree: tree["counts"].update(planned=5, accepted=3))


def name_no_data(out: Path) -> None:
    edit_marker(out, 3, lambda tree: tree.update(files=[]))


def name_twice(out: Path) -> None:
    edit_marker(out, 3, lambda tree: tree["files"].append(tree["files"][0]))


def name_another_spec(out: Path) -> None:
    edit_marker(out, 1, lambda tree: tree.update(spec_fingerprint="0" * 64))


def fail_shard(out: Path) -> None:
    delete_marker(out)
    (out / "_batchgen/failed").mkdir()
    (out / "_batchgen/failed/00003.json").write_text("{}")


SEEN_FROM_LISTINGS = [
    (delete_data, "data/train-00002-of-00004.parquet: "),
    (delete_rejects, "_batchgen/rejects/00001.parquet: "),
    (truncate, "data/train-00000-of-00004.parquet: "),
    (truncate_rejects, "_batchgen/rejects/00000.parquet: "),
    (add_data_file, "data/extra.parquet belongs to no committed shard"),
    (
        add_data_of_another_plan,
        "data/train-00000-of-00005.parquet belongs to no committed shard",
    ),
    (add_rejects, "_batchgen/rejects/00077.parquet belongs to no committed shard"),
    (add_rejects_to_a_shard_without, "_batchgen/rejects/00003.parquet"),
    (delete_marker, "1 of 4 shards are pending (the first is 3)"),
    (empty_marker, "00003.json is damaged (not valid JSON: "),
    (copy_marker, "00002.json is the marker of shard 0"),
    (add_marker, "00009.json is not the marker of one of the plan's 4 shards"),
    (count_fewer, "do not add up to its 6"),
    (count_consistently_wrong, "shard 1: its files hold 4 accepted and 2 other samples"),
    (count_another_plan, "do not add up to its 6"),
    (name_no_data, "shard 3: its marker names no data file"),
    (name_twice, "shard 3: its marker names a file twice"),
    (name_another_spec, "shard 1: belongs to another plan"),
    (fail_shard, "shard 3 failed"),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("damage", "problem"),
    SEEN_FROM_LISTINGS,
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_that_listings_and_markers_show(
    damage: Callable[[Path], None], problem: str, quick: bool, out: Path
) -> None:
    damage(out)
    found = findings(out, quick)
    assert not found.ok
    assert any(problem in text for text in found.problems), found.problems


def flip_byte(out: Path) -> None:
    data = bytearray(data_path(out, 2).read_bytes())
    data[len(data) // 2] ^= 1
    data_path(out, 2).write_bytes(bytes(data))


def edit_sha256(out: Path) -> None:
    table = pq.read_table(data_path(out, 3))
    digests = table.column("sha256").to_pylist()
    mark_again(out, 3, with_column(table, "sha256", [digests[1], *digests[1:]]))


def lose_image(out: Path) -> None:
    table = pq.read_table(data_path(out, 3))
    images = table.column("image").to_pylist()
    images[2]["bytes"] = None
    mark_again(out, 3, with_column(table, "image", images))


def double_key(out: Path) -> None:
    """Put a key of shard 3 into shard 2, as if two rows had the same key."""
    key = pq.read_table(data_path(out, 3)).column("key")[0].as_py()
    table = pq.read_table(data_path(out, 2))
    keys = table.column("key").to_pylist()
    mark_again(out, 2, with_column(table, "key", [key, *keys[1:]]))


def lose_row(out: Path) -> None:
    """Remove a sample and make the marker agree, so that only the plan differs."""
    table = pq.read_table(data_path(out, 3))
    mark_again(out, 3, table.slice(1), {"accepted": 5})


def double_row(out: Path) -> None:
    table = pq.read_table(data_path(out, 3))
    mark_again(out, 3, pa.concat_tables([table.slice(1), table.slice(1, 1)]))


def foreign_row(out: Path) -> None:
    table = pq.read_table(data_path(out, 3))
    sources = table.column("source_id").to_pylist()
    mark_again(out, 3, with_column(table, "source_id", ["b.parquet#1", *sources[1:]]))


def call_failed_rejected(out: Path) -> None:
    """Shard 2 has 2 failed samples; its marker calls them rejected."""
    edit_marker(out, 2, lambda tree: tree["counts"].update(rejected=2, failed=0))


def drop_column(out: Path) -> None:
    mark_again(out, 3, pq.read_table(data_path(out, 3)).drop_columns(["sha256"]))


SEEN_IN_THE_DATA = [
    (
        flip_byte,
        "data/train-00002-of-00004.parquet: content does not match the checksum in",
    ),
    (edit_sha256, "image a-00000009-v0 does not match its sha256 column"),
    (lose_image, "image a-00000010-v0 does not match its sha256 column"),
    (double_key, "shard 2: sample a-00000009-v0: key is 'a-00000009-v0', planned: 'a-00000007-v0'"),
    (lose_row, "shard 3: its marker's counts"),
    (double_row, "shard 3: a sample occurs twice"),
    (double_row, "shard 3: planned sample ('a.parquet#9', 0) is missing"),
    (foreign_row, "shard 3: sample ('b.parquet#1', 0) was never planned"),
    (call_failed_rejected, "shard 2"),
    (drop_column, "shard 3"),
]


@pytest.mark.parametrize(
    ("damage", "problem"),
    SEEN_IN_THE_DATA,
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_that_only_reading_shows(
    damage: Callable[[Path], None], problem: str, out: Path
) -> None:
    damage(out)
    found = findings(out)
    assert not found.ok
    assert any(problem in text for text in found.problems), found.problems


def test_quick_does_not_read_the_data(out: Path) -> None:
    flip_byte(out)
    assert findings(out, quick=True).ok


def test_one_damage_gives_one_problem(out: Path) -> None:
    flip_byte(out)
    found = findings(out)
    named = [text for text in found.problems if "train-00002" in text]
    assert len(named) == 1
    assert all("shard 2" in text or "train-00002" in text for text in found.problems)


def test_problems_are_counted_beyond_what_is_listed() -> None:
    found = Findings(1, 1)
    for number in range(MAX_PROBLEMS + 7):
        found.problem(str(number))
    assert (len(found.problems), found.more_problems, found.ok) == (MAX_PROBLEMS, 7, False)


def test_an_interrupted_run_is_named_pending_and_then_mended(out: Path) -> None:
    delete_marker(out)
    delete_data(out)
    marker_path(out, 2).unlink()
    found = findings(out)
    assert (found.pending, found.committed) == (2, 2)
    assert "2 of 4 shards are pending (the first is 2)" in found.problems[0]
    ledger = Ledger(open_store(str(out)))
    make_output(ledger.require_plan(), ledger)
    assert findings(out).problems == []


def test_making_a_shard_again_gives_the_same_bytes(out: Path) -> None:
    before = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    for shard in range(SHARDS):
        marker_path(out, shard).unlink()
    ledger = Ledger(open_store(str(out)))
    make_output(ledger.require_plan(), ledger)
    assert {path.name: path.read_bytes() for path in (out / "data").iterdir()} == before
