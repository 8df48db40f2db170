"""Outputs of an earlier version are read, verified, exported and finished by this one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen import runner
from batchgen.output.export import export
from batchgen.output.formats import FORMATS
from batchgen.output.ledger import Ledger
from batchgen.output.repair import repair
from batchgen.output.verify import verify
from batchgen.plan.saved import read_plan
from batchgen.spec.build import stored
from batchgen.storage import open_store

OLD = Path(__file__).parents[1] / "old_outputs" / "v0.1"
ONCE = "/data/batchgen-0.1"  # where these outputs were made
MODIFIED_NS = 1795678044054416616  # of prompts.parquet, as the plan has it


def at(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy whose records name the place of the copy."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    os.utime(folder / "prompts.parquet", ns=(MODIFIED_NS, MODIFIED_NS))
    for records in folder.glob("*/_batchgen"):
        plan = read_plan((records / "plan.json").read_text())
        moved = replace(
            plan,
            spec=stored(json.loads(_moved(plan.spec.model_dump_json(), folder))),
            files=tuple(replace(file, path=_moved(file.path, folder)) for file in plan.files),
            frozen=None,
        )
        for path in (*records.glob("*.*"), *records.glob("shards/*.json")):
            text = _moved(path.read_text(), folder)
            text = text.replace(plan.fingerprints.spec, moved.fingerprints.spec)
            path.write_text(text.replace(plan.fingerprints.input, moved.fingerprints.input))
    return folder


def _moved(text: str, folder: Path) -> str:
    return text.replace(ONCE, str(folder))


@pytest.mark.parametrize("form", FORMATS)
def test_verified_as_it_lies(form: str) -> None:
    findings = verify(at(OLD / form))
    assert findings.problems == []
    assert (findings.accepted, findings.rejected, findings.failed) == (8, 2, 0)


@pytest.mark.parametrize("form", FORMATS)
def test_exported_to_every_other_format(form: str, tmp_path: Path) -> None:
    for other in set(FORMATS) - {form}:
        target = open_store(str(tmp_path / other))
        assert export(at(OLD / form), target, other) == 3
        assert verify(Ledger(target)).problems == []


def test_damage_is_found(old: Path) -> None:
    path = old / "parquet" / "data" / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert any(path.name in problem for problem in verify(at(old / "parquet")).problems)


def test_finished(old: Path, ray_session: None) -> None:
    outcome = runner.resume(str(old / "unfinished"), quiet=True)
    assert (outcome.exit_code, outcome.accepted, outcome.rejected) == (0, 8, 2)
    assert verify(at(old / "unfinished")).problems == []
    made = pq.read_table(old / "unfinished" / "data" / "train-00001-of-00003.parquet")
    then = pq.read_table(OLD / "unfinished-00001.parquet")
    for column in set(then.column_names) - {"image", "sha256", "pixel_mean", "pixel_std"}:
        assert made.column(column).equals(then.column(column)), column  # pixels: other machines'


def test_a_plan_of_another_output_has_nothing_set_aside(old: Path) -> None:
    shutil.copy(old / "unfinished" / "_batchgen" / "plan.json", old / "webdataset" / "_batchgen")
    before = {path for path in (old / "webdataset").rglob("*") if path.suffix in (".tar", ".json")}
    repaired = repair(at(old / "webdataset"))
    assert (repaired.withdrawn, repaired.aside, repaired.exit_code) == ((), {}, 4)
    assert "plan.json may be that of another output" in repaired.sentence("here")
    assert all(path.exists() for path in before)
