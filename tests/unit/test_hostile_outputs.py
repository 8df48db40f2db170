"""A malicious output: verification reports it, and an export writes nothing of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import BatchgenError, InputError
from batchgen.output.export import export
from batchgen.output.formats import FORMATS, parquet_bytes
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.records import derive_seed
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, png, prompts, write_columns

SHARDS = 2
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with keys of their own (``keyed``), and without: 2 shards of 3 samples."""
    folder = tmp_path_factory.mktemp("hostile")
    columns = {"prompt": prompts(6), "name": list("abcdef"), "kind": ["x", "y"] * 3}
    path = write_columns(folder / "a.parquet", columns)
    for name, more in (("plain", {}), ("keyed", {"input__columns__key": "name"})):
        settings: dict[str, Any] = {"output__samples_per_shard": 3, "variants": 1, **more}
        plan = plan_for(path, folder / name, input__columns__label="kind", **settings)
        make_output(plan, Ledger(open_store(str(folder / name))))
    return folder


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(whole / name, tmp_path / "out"))


def at(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)))


def rewrite(out: Path, change: Callable[[Rows], object], shard: int = 1) -> None:
    """Change rows of a shard, and make its marker agree with them."""
    path = out / f"data/train-{shard:05d}-of-{SHARDS:05d}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    replace_data(out, pa.Table.from_pylist(rows, table.schema), shard)


def replace_data(out: Path, table: pa.Table, shard: int = 1) -> None:
    data = parquet_bytes(table)
    (out / f"data/train-{shard:05d}-of-{SHARDS:05d}.parquet").write_bytes(data)
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_marker(out, lambda tree: tree["files"][0].update(facts), shard)


def edit_marker(out: Path, change: Callable[[dict[str, Any]], object], shard: int = 1) -> None:
    path = out / f"_batchgen/shards/{shard:05d}.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def everything_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


EVIL = "../../../../../escaped/cron.d/evil"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["plain", "keyed"])
@pytest.mark.parametrize(
    "row",
    [
        {"path": EVIL},
        {"path": "/etc/cron.d/evil.png"},
        {"key": "../../x-v0", "path": "../../x-v0.png"},
        {"key": "a/b-v0", "path": "a/b-v0.png"},
        {"key": "a.b-v0", "path": "a.b-v0.png"},
        {"path": "f-v0.exe"},
        {"key": "", "path": ".png"},
    ],
)
def test_no_name_of_an_output_becomes_a_path(
    row: dict[str, str], name: str, form: str, out: Callable[[str], Path], tmp_path: Path
) -> None:
    """The source passed verification, and its export wrote outside of the target."""
    folder = out(name)

    def poison(rows: Rows) -> None:
        rows[2]["image"]["path"] = row["path"]
        rows[2]["key"] = row.get("key", rows[2]["key"])

    rewrite(folder, poison)
    assert any("shard 1: " in problem for problem in verify(at(folder)).problems)
    before = everything_in(tmp_path)
    target = tmp_path / "a/b/c/target"
    with pytest.raises(InputError, match=r"shard 1: .*; see `batchgen verify"):
        export(at(folder), open_store(str(target)), form)
    written = everything_in(tmp_path) - before
    assert all(path.is_relative_to(target) and "evil" not in path.name for path in written)


@pytest.mark.parametrize("kind", ["absolute", "upward", "pipe", "device", "huge", "records"])
def test_a_marker_names_only_what_a_run_writes(
    kind: str, out: Callable[[str], Path], tmp_path: Path
) -> None:
    """Reading waited forever for a pipe, and read a device until memory was full."""
    folder = out("plain")
    name = "data/train-00001-of-00002.parquet"
    path = folder / name
    if kind in ("pipe", "device"):
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    given = {
        "absolute": {"name": "/dev/zero"},
        "upward": {"name": "data/../../secret"},
        "huge": {"bytes": 2**52},
        "records": {"name": "_batchgen/plan.json"},
    }.get(kind, {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()})
    edit_marker(folder, lambda tree: tree["files"][0].update(given))
    (tmp_path / "secret").write_text("x")
    problems = verify(at(folder)).problems
    assert any("shard 1: its marker names '" in one or name in one for one in problems), problems
    with pytest.raises(BatchgenError, match="see `batchgen verify"):
        export(at(folder), open_store(str(tmp_path / "target")), "webdataset")
    assert verify(at(folder), quick=True).ok == (kind in ("pipe", "device"))  # of no bytes


def exchange(rows: Rows) -> None:
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    rows[0]["sha256"], rows[1]["sha256"] = rows[1]["sha256"], rows[0]["sha256"]


def no_image(rows: Rows) -> None:
    rows[0]["image"]["bytes"] = b""
    rows[0]["sha256"] = hashlib.sha256(b"").hexdigest()


def other_size(rows: Rows) -> None:
    rows[0]["image"]["bytes"] = png(8, 16)
    rows[0]["sha256"] = hashlib.sha256(png(8, 16)).hexdigest()


CHANGED: list[tuple[Callable[[Rows], object], str]] = [
    (
        lambda rows: rows[0].update(key="renamed-v0"),
        "key is 'renamed-v0', planned: 'a-00000003-v0'",
    ),
    (lambda rows: rows[0].update(seed=5), "seed is 5, planned: "),
    (lambda rows: rows[0].update(width=24), "width is 24, planned: 16"),
    (lambda rows: rows[0].update(height=None), "height is None, planned: 8"),
    (lambda rows: rows[0].update(model_id="other"), "model_id is 'other', planned: 'paper/model'"),
    (lambda rows: rows[0].update(model_revision=None), "model_revision is None"),
    (lambda rows: rows[0].update(task="control"), "task is 'control', planned: 'text-to-image'"),
    (lambda rows: rows[0].update(guidance_scale=3.5), "guidance_scale is 3.5, planned: 3.0"),
    (lambda rows: rows[0].update(strength=0.5), "strength is 0.5, planned: None"),
    (lambda rows: rows[0].update(scheduler="X"), "scheduler is 'X', planned: 'DDIMScheduler'"),
    (lambda rows: rows[0].update(negative_prompt="x"), "negative_prompt is 'x', planned: ''"),
    (lambda rows: rows[0].update(num_inference_steps=6), "num_inference_steps is 6, planned: 5"),
    (exchange, "image.path is 'a-00000004-v0.png', planned: 'a-00000003-v0.png' (and 1 more"),
    (no_image, "image a-00000003-v0 cannot be decoded; its row says 16 x 8"),
    (other_size, "image a-00000003-v0 has 8 x 16 pixels; its row says 16 x 8"),
]


@pytest.mark.parametrize(("change", "problem"), CHANGED)
def test_verify_checks_what_follows_from_the_plan(
    change: Callable[[Rows], object], problem: str, out: Callable[[str], Path], tmp_path: Path
) -> None:
    """Data and a marker that were edited together passed verification, and could be exported."""
    folder = out("plain")
    rewrite(folder, change)
    assert any(problem in text for text in verify(at(folder)).problems)
    if change in (no_image, other_size):  # their bytes are what the row says: export copies them
        assert verify(at(folder), skip=["decode"]).skipped == ["decode"]
        assert verify(at(folder), skip=["decode"]).ok
        return
    with pytest.raises(InputError, match="see `batchgen verify"):
        export(at(folder), open_store(str(tmp_path / "target")), "parquet")


def test_an_export_does_not_launder_a_marker(out: Callable[[str], Path], tmp_path: Path) -> None:
    for change in ({"spec_fingerprint": "0" * 64}, {"plan_fingerprint": "0" * 64}):
        folder = out("plain")
        edit_marker(folder, lambda tree, change=change: tree.update(change))  # type: ignore[misc]
        with pytest.raises(InputError, match="shard 1: belongs to another plan"):
            export(at(folder), open_store(str(tmp_path / "target")), "parquet")
        shutil.rmtree(folder)
    folder = out("plain")
    shutil.copy(folder / "_batchgen/shards/00000.json", folder / "_batchgen/shards/00001.json")
    with pytest.raises(BatchgenError, match="marker of shard 0"):
        export(at(folder), open_store(str(tmp_path / "other")), "parquet")


@pytest.mark.parametrize("name", ["prompt", "seed", "kind"])
def test_a_dropped_or_changed_column_is_named(name: str, out: Callable[[str], Path]) -> None:
    folder = out("plain")
    table = pq.read_table(folder / "data/train-00001-of-00002.parquet")
    replace_data(folder, table.drop_columns([name]))
    planned = "int64" if name == "seed" else "string"
    told = f"shard 1: column {name!r} is missing; planned: {planned}"
    assert told in verify(at(folder)).problems
    replace_data(folder, table.append_column("more", pa.array([1, 2, 3])))
    assert "shard 1: column 'more' is int64; planned: no such column" in verify(at(folder)).problems


def test_keys_of_the_rows_own_are_of_their_variant_and_unique(out: Callable[[str], Path]) -> None:
    folder = out("keyed")
    assert verify(at(folder)).problems == []

    def double(rows: Rows) -> None:
        key = rows[0]["key"]
        rows[1].update(key=key, image={**rows[1]["image"], "path": f"{key}.png"})
        rows[1]["seed"] = derive_seed(0, key)

    rewrite(folder, double)
    assert verify(at(folder)).problems == ["keys that occur more than once in the output: 1"]
    rewrite(folder, lambda rows: rows[1].update(key="e-v1"))
    assert "shard 1: key 'e-v1' is not a key that a run gives" in verify(at(folder)).problems
