"""A damaged output is told by every command that meets it, and mended on request."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchgen import runner
from batchgen.cli import main
from batchgen.ledger import DATA, Ledger
from batchgen.progress import Tally
from batchgen.runner import Outcome
from batchgen.storage import open_store
from batchgen.writer import FORMATS
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
    return runner.finalize(plan, ledger, Tally(plan.shards, plan.samples))


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
    """A traceback of the image library stood there before."""
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
    """Both said that all was well before."""
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
