"""Every command that meets a damaged output reports it, and `verify --repair` repairs it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchgen import runner
from batchgen.cli import main
from batchgen.output import ledger as ledger_module
from batchgen.output import verify as verify_module
from batchgen.output.formats import FORMATS
from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import DATA, SHARD_FOLDERS, Ledger, marker_name
from batchgen.output.marker import Written
from batchgen.output.outcome import Outcome
from batchgen.output.proof import Prover
from batchgen.output.repair import repair
from batchgen.output.verify import LostFiles, verify
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts, write_columns

SHARDS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In each format: 4 shards of 6 samples; some rows are dropped."""
    folder = tmp_path_factory.mktemp("damage")
    texts: list[str] = prompts(12)
    texts[1], texts[5] = "", "broken picture"
    path = write_columns(folder / "a.parquet", {"prompt": texts})
    for name in FORMATS:
        settings = {"output__samples_per_shard": 6, "output__format": name}
        plan = plan_for(path, folder / name, variants=2, **settings)
        make_output(plan, Ledger(open_store(str(folder / name))))
    return folder


@pytest.fixture(params=FORMATS)
def out(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / request.param, tmp_path / "out"))


def at(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)))


def finalized(out: Path) -> Outcome:
    ledger = at(out)
    plan = ledger.require_plan()
    return finalize(plan, ledger, Tally(plan.shards, plan.samples))


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def file_with_images(out: Path, shard: int) -> Path:
    """A file of this shard that holds image bytes."""
    marker = at(out).marker(shard)
    assert marker is not None
    names = [one.name for one in marker.files if one.name.startswith(DATA)]
    return out / next(name for name in names if not name.endswith(".jsonl"))


def flip_images(path: Path) -> None:
    """Every byte of the file's PNG pixel data changed, the sizes kept."""
    data = bytearray(path.read_bytes())
    start = 0
    while (start := data.find(b"IDAT", start + 1)) >= 0:
        for place in range(start + 4, start + 40):
            data[place] ^= 0xFF
    path.write_bytes(bytes(data))


def test_the_end_of_a_run_tells_of_damaged_images(out: Path) -> None:
    """It used to end with a traceback of the image library."""
    path = file_with_images(out, 2)
    flip_images(path)
    outcome = finalized(out)
    name = str(path.relative_to(out))
    assert outcome.exit_code == 4
    assert f"{name} of {out}: missing or damaged, though committed" in outcome.message
    assert f"batchgen verify {out} --repair" in outcome.message
    assert name in (out / "_batchgen/report.html").read_text()


@pytest.mark.parametrize("truncated", [False, True])
def test_status_and_the_end_of_a_run_tell_of_missing_files(truncated: bool, out: Path) -> None:
    """Both used to report success."""
    path = file_with_images(out, 1)
    path.write_bytes(path.read_bytes()[:-1]) if truncated else path.unlink()
    name = str(path.relative_to(out))
    outcome = finalized(out)
    assert (outcome.exit_code, name in outcome.message) == (4, True)
    status = invoke("status", out)
    assert status.exit_code == 4
    assert f"{name} of {out}: missing or damaged" in status.output


def test_an_untouched_output_is_not_called_damaged(out: Path) -> None:
    assert finalized(out).exit_code == 2  # some samples failed
    assert invoke("status", out).exit_code == 2


# Repair


def tree_of(out: Path) -> dict[str, bytes]:
    """All files that a reader of the output may find, and the committed shards."""
    ours = (f"{DATA}/", "_batchgen/rejects/", "_batchgen/schemas/", "_batchgen/shards/")
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and name.startswith(ours):
            found[name] = b"" if name.startswith("_batchgen/shards/") else path.read_bytes()
    return found


def lose(out: Path) -> list[int]:
    file_with_images(out, 2).unlink()
    return [2]


def change(out: Path) -> list[int]:
    flip_images(file_with_images(out, 1))
    return [1]


def cut(out: Path) -> list[int]:
    path = file_with_images(out, 3)
    path.write_bytes(path.read_bytes()[:-7])
    return [3]


def empty(out: Path) -> list[int]:
    for shard in (1, 2):
        file_with_images(out, shard).write_bytes(b"")
    return [1, 2]


def lose_rejects(out: Path) -> list[int]:
    next((out / "_batchgen/rejects").iterdir()).unlink()
    return [0]


def lose_schema(out: Path) -> list[int]:
    found = list(out.glob("_batchgen/schemas/*"))
    for path in found:
        path.unlink()
    return list(range(SHARDS)) if found else []


def break_marker(out: Path) -> list[int]:
    (out / "_batchgen/shards/00003.json").write_text('{"shard": 3')
    return [3]


def change_marker(out: Path) -> list[int]:
    path = out / "_batchgen/shards/00002.json"
    path.write_text(path.read_text().replace('"accepted": ', '"accepted": 1'))
    return [2]


def swap_marker(out: Path) -> list[int]:
    shutil.copy(out / "_batchgen/shards/00001.json", out / "_batchgen/shards/00002.json")
    return [2]


def rename_marker(out: Path) -> list[int]:
    (out / "_batchgen/shards/00001.json").rename(out / "_batchgen/shards/1.json")
    return []


def add_files(out: Path) -> list[int]:
    (out / DATA / "mine.txt").write_text("mine")
    shutil.copy(file_with_images(out, 0), out / DATA / "copy.bin")
    return []


DAMAGE = [
    *(lose, change, cut, empty, lose_rejects, lose_schema),
    *(break_marker, change_marker, swap_marker, rename_marker, add_files),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_and_resume_give_the_bytes_of_an_undisturbed_run(
    damage: Callable[[Path], list[int]], out: Path
) -> None:
    before = tree_of(out)
    withdrawn = damage(out)
    mended = invoke("verify", out, "--repair", "--json")
    told = json.loads(mended.stdout)
    assert told["withdrawn"] == withdrawn
    assert mended.exit_code == (3 if withdrawn or damage is rename_marker else 0)
    ledger = at(out)
    make_output(ledger.require_plan(), ledger)
    assert tree_of(out) == before
    assert verify(at(out)).problems == []
    for name, place in told["aside"].items():  # nothing of the user's is lost
        assert (out / place).exists() and not (out / name).exists()


def test_a_damaged_output_says_what_is_wrong_and_what_to_do(out: Path) -> None:
    for shard in (1, 2):
        for path in [file_with_images(out, shard)]:
            path.unlink()
    result = invoke("verify", out)
    *_, last = result.output.splitlines()
    assert last == (
        f"NOT VERIFIED: 2 of 4 shards are damaged (1, 2): `batchgen verify {out} --repair` "
        f"withdraws them, then `batchgen resume {out}` regenerates them"
    )
    assert "missing, but _batchgen/shards/00001.json names it" in result.output
    assert "planned sample" not in result.output and len(result.output.splitlines()) == 3
    quick = invoke("verify", out, "--quick")
    assert quick.output.count("missing, but") == 2 and "None" not in quick.output


def test_another_folder_of_a_shards_files_is_listed_and_repaired(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ledger_module, verify_module):
        monkeypatch.setattr(module, "SHARD_FOLDERS", (*SHARD_FOLDERS, "_batchgen/masks"))
    monkeypatch.setattr(Prover, "_is_own", lambda *name: True)
    marker, name = at(out).marker(1), "_batchgen/masks/00001.bin"
    assert marker is not None
    mask = Written(name, 4, hashlib.sha256(b"mask").hexdigest(), 0)
    at(out).store.put(marker_name(1), replace(marker, files=(*marker.files, mask)).to_json())
    at(out).store.put(name, b"mask")
    lost = LostFiles(at(out))
    lost.see(at(out).marker(1) or marker)
    assert lost.names == []
    at(out).store.put(name, b"other")
    at(out).store.put("_batchgen/masks/00009.bin", b"stray")
    repaired = repair(at(out))
    assert repaired.withdrawn == (1,) and repaired.found.lost == [name]
    assert list(repaired.aside) == ["_batchgen/masks/00009.bin"]
    assert at(out).store.list("_batchgen/masks") == {}


def test_many_lost_files_of_a_shard_are_one_line(out: Path) -> None:
    marker = at(out).marker(3)
    assert marker is not None
    names = [one.name for one in marker.files if one.name.startswith(DATA)]
    for name in names:
        (out / name).unlink()
    found = verify(at(out))
    assert len(found.problems) == 1
    assert (f"and {len(names) - 1} more files of shard 3" in found.problems[0]) == (len(names) > 1)


def test_what_was_made_for_another_plan_is_left_alone(out: Path) -> None:
    path = out / "_batchgen/shards/00002.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "plan_fingerprint": "0" * 64}))
    file_with_images(out, 1).unlink()
    before = path.read_bytes()
    result = invoke("verify", out, "--repair")
    assert result.exit_code == 4
    assert "withdrawn: shard 1" in result.output and "withdrawn: shard 2" not in result.output
    assert "1 of 4 shards are undamaged but do not match the plan (2)" in result.output
    assert "remove their markers (_batchgen/shards/00002.json), and `batchgen re" in result.output
    assert path.read_bytes() == before


def test_with_the_plan_of_another_output_nothing_is_to_be_set_aside(
    out: Path, tmp_path: Path
) -> None:
    """All files seemed to belong to no shard, and the message recommended --repair."""
    source = write_columns(tmp_path / "other.parquet", {"prompt": prompts(4)})
    other = plan_for(source, tmp_path / "other", output__samples_per_shard=1)
    (out / "_batchgen/plan.json").write_text(other.to_json())

    def holdings() -> list[Path]:
        return sorted(p for top in ("data", "_batchgen/shards") for p in (out / top).rglob("*"))

    before = holdings()
    for words in (["verify", out], ["verify", out, "--repair"]):
        result = invoke(*words)
        assert result.exit_code == 4
        assert "--repair`" not in result.output
        assert holdings() == before


@pytest.mark.parametrize("version", [99, 10**400], ids=["99", "of 400 digits"])
def test_a_marker_of_a_newer_version_is_left_alone(out: Path, version: int) -> None:
    path = out / "_batchgen/shards/00002.json"
    path.write_text(path.read_text().replace('"version": 1', f'"version": {version}'))
    result = invoke("verify", out, "--repair")
    assert "newer batchgen" in result.output and path.exists()


def test_an_output_at_work_is_not_repaired(out: Path) -> None:
    file_with_images(out, 1).unlink()
    lease = acquire_lease(at(out).store)
    result = invoke("verify", out, "--repair")
    assert result.exit_code == 1 and "is held by another run" in result.output
    assert (out / "_batchgen/shards/00001.json").exists()
    lease.release()


def test_an_undamaged_output_stays_as_it_is(out: Path) -> None:
    before = tree_of(out)
    result = invoke("verify", out, "--repair")
    assert result.exit_code == 0 and "verified" in result.output
    assert tree_of(out) == before


def test_resume_verifies_first_when_asked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree_of(out)
    path = file_with_images(out, 2)
    flip_images(path)

    def resume(url: str, *more: object) -> Outcome:
        ledger = at(Path(url))
        make_output(ledger.require_plan(), ledger)
        return finalized(Path(url))

    monkeypatch.setattr(runner, "resume", resume)
    result = invoke("resume", out, "--verify")
    assert (
        f"{path.relative_to(out)}: content does not match the checksum in _batchgen"
        in result.output
    )
    assert "withdrawn: shard 2" in result.output
    assert tree_of(out) == before
