"""Quotas on real Ray with the shipped model: killed, resumed, and by two runs side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchgen import runner
from batchgen.cli import main
from batchgen.curate.selection import selected_keys
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from tests.outputs import digests_of, spec_for

pytestmark = pytest.mark.usefixtures("ray_session")
ASKED = {"per": ["label"], "accepted": 4, "where": "seed % 3 = 0", "budget": 90}


def spec_in(folder: Path, output: str, **settings: Any) -> Spec:
    """Six rows of two labels; a third of their images count."""
    if not (folder / "in.parquet").exists():
        labels = ["red", "blue"] * 3
        texts = [f"a {label} circle on a white background" for label in labels]
        pq.write_table(pa.table({"prompt": texts, "label": labels}), folder / "in.parquet")
    fields: dict[str, Any] = {"input__columns__label": "label", "quota": ASKED}
    return spec_for(folder / "in.parquet", folder / output, **{**fields, **settings})


def chosen(output: Path) -> dict[str, str]:
    """key -> sha256 of the selection ``quota``."""
    ledger = Ledger(open_store(str(output)))
    keys = selected_keys(ledger, ledger.parts(), "quota")
    return {key: digest for key, digest in digests_of(output).items() if key in keys}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> tuple[Path, dict[str, str]]:
    """An undisturbed run, and what it has chosen."""
    folder = tmp_path_factory.mktemp("quota")
    outcome = runner.run(spec_in(folder, "whole"), quiet=True)
    assert outcome.exit_code == 0, outcome.message
    assert outcome.images_made == outcome.accepted > 8
    ledger = Ledger(open_store(str(folder / "whole")))
    assert len(ledger.parts()) > 1 and verify(ledger).ok
    made = chosen(folder / "whole")
    assert Counter(int(key.split("-")[1]) % 2 for key in made) == {0: 4, 1: 4}
    return folder, made


def test_a_killed_quota_chooses_the_same_images(whole: tuple[Path, dict[str, str]]) -> None:
    folder, made = whole
    spec = spec_in(folder, "killed")
    (folder / "job.yaml").write_text(spec.to_yaml())
    output, kills = folder / "killed", 0
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for shards in (1, 3):  # in the first part, and in the first round
        command = [sys.executable, "-m", "batchgen", "run", str(folder / "job.yaml")]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        until = time.monotonic() + 120
        markers = output / "_batchgen" / "shards"
        while len(list(markers.glob("*.json"))) < shards and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills == 2
    told = CliRunner().invoke(main, ["status", str(output)])
    assert told.exit_code == 3, told.output
    outcome = runner.resume(str(output), quiet=True)
    assert outcome.exit_code == 0, outcome.message
    assert chosen(output) == made
    told = CliRunner().invoke(main, ["status", str(output)])
    assert told.exit_code == 0 and "quota: 2 of 2 groups are full" in told.output


def test_two_runs_side_by_side_choose_the_same_images(whole: tuple[Path, dict[str, str]]) -> None:
    folder, made = whole
    spec = spec_in(folder, "two")
    (folder / "two.yaml").write_text(spec.to_yaml())
    output = folder / "two"
    command = [sys.executable, "-m", "batchgen", "run", str(folder / "two.yaml"), "--shards"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pair = [
        subprocess.Popen([*command, shards], env=environment, start_new_session=True)
        for shards in ("0:1", "1:2")
    ]
    codes = sorted(process.wait(timeout=240) for process in pair)
    assert codes in ([0, 0], [0, 3]), codes  # one of them, or both in turn, made the rounds
    assert runner.resume(str(output), quiet=True).exit_code == 0
    assert verify(Ledger(open_store(str(output)))).ok
    assert chosen(output) == made
