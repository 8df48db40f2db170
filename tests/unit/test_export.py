"""A finished output in another format: the same samples, proven by the target's own markers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchgen.cli import main
from batchgen.errors import InputError, OutputBusy, PlanChanged, SpecError
from batchgen.output import export as exporting
from batchgen.output.export import export
from batchgen.output.formats import FORMATS
from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker
from batchgen.output.verify import verify
from batchgen.storage import Store, open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts, write_columns

SHARDS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In each format: 4 shards, of which the first has no accepted sample."""
    folder = tmp_path_factory.mktemp("export")
    texts: list[str] = prompts(12)
    texts[:3] = ["", "", "flat picture"]
    texts[6] = "broken picture"
    columns = {"prompt": texts, "kind": ["b", "a", "c"] * 4, "blob": [b"\xff"] * 12}
    path = write_columns(folder / "a.parquet", columns)
    for name in FORMATS:
        plan = plan_for(
            path,
            folder / name,
            variants=2,
            output__samples_per_shard=6,
            output__format=name,
            input__columns__label="kind",
        )
        make_output(plan, Ledger(open_store(str(folder / name))))
    return folder


def at(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)))


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "target"))


def data_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_an_export_is_what_a_run_would_have_written(
    before: str, after: str, whole: Path, target: Store
) -> None:
    assert export(at(whole / before), target, after) == SHARDS
    assert data_of(Path(target.root)) == data_of(whole / after)
    found = verify(Ledger(target))
    assert found.problems == verify(Ledger(target), quick=True).problems == []
    same = {name: value for name, value in asdict(found).items() if name != "bytes"}
    wanted = asdict(verify(at(whole / before)))
    assert same == {name: value for name, value in wanted.items() if name != "bytes"}


def test_the_target_is_an_output_of_its_own(whole: Path, target: Store) -> None:
    export(at(whole / "parquet"), target, "webdataset")
    ledger = Ledger(target)
    plan, job = ledger.require_plan(), ledger.job()
    assert (plan.spec.output.format, plan.spec.output.url) == ("webdataset", target.url)
    assert job.output == plan.spec.output
    for shard in range(SHARDS):
        old, new = at(whole / "parquet").marker(shard), ledger.marker(shard)
        assert old is not None and new is not None
        assert (new.counts, new.reasons, new.environment) == (
            old.counts,
            old.reasons,
            old.environment,
        )
        assert new.spec_fingerprint == plan.spec.fingerprint != old.spec_fingerprint
    rejects = "_batchgen/rejects/00000.parquet"
    assert target.read(rejects) == (whole / "parquet" / rejects).read_bytes()


def test_an_interrupted_export_goes_on(
    whole: Path, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = exporting.commit_shard

    def commit_some(ledger, plan, marker, accepted, rejects):  # type: ignore[no-untyped-def]
        if marker.shard == 2:
            raise KeyboardInterrupt
        return commit(ledger, plan, marker, accepted, rejects)

    monkeypatch.setattr(exporting, "commit_shard", commit_some)
    monkeypatch.setattr(exporting, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        export(at(whole / "parquet"), target, "image-folder")
    monkeypatch.undo()
    ledger = Ledger(target)
    pending = ledger.states(ledger.require_plan()).pending
    assert 2 in pending and len(pending) < SHARDS
    untouched = ledger.marker(0)
    (Path(target.root) / "_batchgen/job.yaml").unlink()
    assert export(at(whole / "parquet"), target, "image-folder") == len(pending)
    assert ledger.marker(0) == untouched
    assert ledger.job().output.format == "image-folder"
    assert data_of(Path(target.root)) == data_of(whole / "image-folder")
    assert export(at(whole / "parquet"), target, "image-folder") == 0


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "parquet", tmp_path / "source"))


def test_an_unfinished_source_is_refused(source: Path, target: Store) -> None:
    (source / "_batchgen/shards/00002.json").unlink()
    with pytest.raises(InputError, match=r"1 of 4 shards are pending or failed \(2\)"):
        export(at(source), target, "webdataset")
    at(source).fail(FailedMarker(2, 6, "E", "m", "t", 1, "h", 0.0))
    with pytest.raises(InputError, match=r"\(2\)"):
        export(at(source), target, "webdataset")
    assert target.find("") == {}


def test_a_place_without_an_output_is_refused(tmp_path: Path, target: Store) -> None:
    with pytest.raises(InputError, match="no run has started there"):
        export(at(tmp_path / "none"), target, "webdataset")


def test_a_target_with_other_files_is_refused(source: Path, target: Store) -> None:
    target.put("mine.txt", b"x")
    with pytest.raises(InputError, match=r"is not empty \(mine.txt\)"):
        export(at(source), target, "webdataset")


def test_a_target_of_another_format_is_refused(source: Path, target: Store) -> None:
    export(at(source), target, "webdataset")
    with pytest.raises(PlanChanged, match=r"output\.format"):
        export(at(source), target, "image-folder")


@pytest.mark.parametrize("place", ["", "data", "_batchgen/new"])
def test_a_target_in_the_source_is_refused(place: str, source: Path) -> None:
    before = data_of(source)
    with pytest.raises(InputError, match="must not be inside the source output"):
        export(at(source), open_store(str(source / place)), "webdataset")
    assert data_of(source) == before


def test_an_unknown_format_is_refused(source: Path, target: Store) -> None:
    with pytest.raises(SpecError, match=r"output\.format"):
        export(at(source), target, "zip")


def test_the_command_names_the_formats_that_there_are(
    source: Path, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "another", FORMATS["parquet"])
    words = ["export", str(source), target.url, "--format", "zip"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert f"allowed: {', '.join(FORMATS)}\n" in result.output and "another" in result.output


def test_a_target_that_is_written_to_is_refused(source: Path, target: Store) -> None:
    acquire_lease(target)
    with pytest.raises(OutputBusy):
        export(at(source), target, "webdataset")


def test_a_damaged_source_is_named(source: Path, target: Store) -> None:
    path = source / "data/train-00001-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train-00001-of-00004.parquet: content does not match"):
        export(at(source), target, "webdataset")
    path.unlink()
    with pytest.raises(InputError, match=r"train-00001-of-00004.parquet: missing"):
        export(at(source), target, "webdataset")
    marker = Ledger(target).marker(1)
    assert marker is None


def test_a_source_with_too_few_samples_is_refused(source: Path, target: Store) -> None:
    path = source / "_batchgen/shards/00003.json"
    tree = json.loads(path.read_bytes())
    tree["counts"].update(accepted=5, rejected=1)
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="shard 3: its files hold 6 accepted and 0 other samples"):
        export(at(source), target, "webdataset")


def test_parquet_comes_back_with_its_types(whole: Path, tmp_path: Path) -> None:
    export(at(whole / "image-folder"), open_store(str(tmp_path / "back")), "parquet")
    table = pq.read_table(tmp_path / "back/data/train-00001-of-00004.parquet")
    assert table.column("blob").to_pylist() == [b"\xff"] * 6
    assert table.equals(pq.read_table(whole / "parquet/data/train-00001-of-00004.parquet"))
