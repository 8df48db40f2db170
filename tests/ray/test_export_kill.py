"""An export of labels that is killed leaves no file of annotations, and continues."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchgen.output.datasets.choose import LAYOUTS, export_to
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.labelled_outputs import labelled_output, write_source

ROWS = 600
LAST = {"coco": "annotations", "yolo": "data.yaml", "voc": "ImageSets", "mask-png": "classes.json"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    source = write_source(folder / "a.parquet", rows=ROWS)
    labelled_output(source, folder / "out", "objects", "label_mask", output__samples_per_shard=25)
    return folder / "out"


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if "_batchgen" not in name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_export_continues(layout: str, out: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-m", "batchgen", "export", str(out), str(target), "--to", layout]
    for least in (30, 300):  # files that are there before the process is killed
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while len(list(target.rglob("*.png"))) < least and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        process.wait(timeout=30)
        assert process.returncode == -9, "it was killed before its end"
        assert not (target / LAST[layout]).exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(("0 ", "24 ")), "some shards were there already"
    fresh = tmp_path / "fresh"
    export_to(Ledger(open_store(str(out))), open_store(str(fresh)), layout)
    assert files_of(target) == files_of(fresh)
