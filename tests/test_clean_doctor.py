"""`clean` and `doctor` on local disks and in memory (on a real object store: test_s3_*)."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem

from batchgen import clean, doctor
from batchgen.cli import main
from batchgen.errors import InputError, OutputBusy
from batchgen.lease import acquire_lease
from batchgen.ledger import Ledger
from batchgen.storage import TEMPORARY, Store, open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_prompts


def others_lease() -> bytes:
    """Just renewed: it is made when it is needed, however long the tests before it took."""
    tree = {"owner": "other", "renewed_at": time.time(), "released": False}
    return json.dumps(tree).encode()


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def finished(tmp_path: Path) -> Ledger:
    source = write_prompts(tmp_path / "in.parquet", 5)
    plan = plan_for(source, tmp_path / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    return ledger


def test_clean_removes_temporary_files_alone(finished: Ledger) -> None:
    store = finished.store
    before = store.find("data")
    Path(store.path(TEMPORARY)).mkdir(parents=True, exist_ok=True)
    Path(store.path(f"{TEMPORARY}/half")).write_bytes(b"1")
    assert clean.clean(finished, dry_run=True).temporary_files == ("half",)
    assert store.list(TEMPORARY) == {"half": 1}
    result = invoke("clean", store.url)
    assert result.exit_code == 0 and "removed 0 unfinished uploads and 1 temp" in result.output
    assert store.list(TEMPORARY) == {}
    assert store.find("data") == before


def test_clean_leaves_a_living_run_alone(finished: Ledger) -> None:
    acquire_lease(finished.store)
    with pytest.raises(OutputBusy, match="is held by another run"):
        clean.clean(finished)


def test_clean_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was run into it"):
        clean.clean(Ledger(open_store(str(tmp_path))))


def test_doctor_tries_everything_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 5)
    output = tmp_path / "out"
    result = invoke("doctor", "--input", str(source), "--output", str(output), "--json")
    assert result.exit_code == 0
    checks = json.loads(result.stdout)
    assert [check["grade"] for check in checks] == ["ok", "ok", "ok"]
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_doctor_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = invoke("doctor", "--input", "nowhere", "--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "failed   input and model: input nowhere: no such file or folder" in result.output
    assert "Not a directory" in result.output


class Careless(MemoryFileSystem):
    """A store that overwrites what it was told only to create, as some that speak S3 do."""

    cachable = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        return super().pipe_file(path, value, mode="overwrite", **kwargs)


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("batchgen.lease.SETTLE_SECONDS", 0.05)
    return Store(Careless(), f"/{uuid.uuid4().hex}", "careless://", local=False)


def test_doctor_warns_of_a_store_without_create_only_writes(careless: Store) -> None:
    grade, message = doctor._exclusive(careless)
    assert grade == "warning" and "overwrite" in message


def test_where_names_are_taken_twice_the_last_writer_holds_the_lease(
    careless: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert acquire_lease(careless).still_held()
    real_sleep = time.sleep

    def other_takes_it_too(seconds: float) -> None:
        careless.put("_batchgen/lease/00002.json", others_lease())
        real_sleep(seconds)

    Ledger(careless).store.put(
        "_batchgen/lease/00001.json",
        json.dumps({"owner": "x", "renewed_at": 0, "released": True}).encode(),
    )
    monkeypatch.setattr("batchgen.lease.time.sleep", other_takes_it_too)
    with pytest.raises(OutputBusy, match=r"another run \(other\)"):
        acquire_lease(careless)
