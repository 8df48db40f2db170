"""A few seeded, disturbed runs on a real S3 server; `make chaos N=100` does many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import Ledger
from batchgen.storage import configure, open_store
from tests.chaos.store import chaos, table
from tests.object_store.server import S3Server

CI_SEEDS = [47, 68]  # every kind of kill, an upload that is torn, a burst of slow-downs


@pytest.mark.long
def test_disturbed_runs_lose_and_double_nothing(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.exports.items():  # put back what the runs set
        monkeypatch.setenv(name, value)
    runs = chaos(tmp_path, CI_SEEDS)
    configure()
    assert all(run.clean for run in runs), table(runs)
    assert all(sum(run.faults.values()) >= 3 for run in runs)
    befell = set().union(*(run.faults for run in runs))
    assert {
        "driver killed",
        "replica killed",
        "gateway killed",
        "slow-down",
        "lost-completion",
    } <= befell, befell


REACH = """
import json, sys, time
from batchgen.errors import OutputBusy
from batchgen.output.lease import acquire_lease
from batchgen.storage import open_store
try:
    lease = acquire_lease(open_store(sys.argv[1]))
    print(json.dumps({"won": lease.owner}), flush=True)
    time.sleep(600)
except OutputBusy as error:
    print(json.dumps({"refused": str(error)}), flush=True)
"""


def test_of_twelve_runs_one_works_and_eleven_name_it(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_bucket}/out"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", REACH, url], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(12)
    ]
    try:
        said = []
        for run in runs:
            assert run.stdout is not None
            said.append(json.loads(run.stdout.readline()))
        (owner,) = [one["won"] for one in said if "won" in one]
        winner = f"pid {owner.split()[1]},"
        refusals = [one["refused"] for one in said if "refused" in one]
        assert len(refusals) == 11
        assert all(url in text for text in refusals)
        assert any(winner in text for text in refusals)
        assert all(winner in text or "at the same moment" in text for text in refusals)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    # Its process is gone: on this machine at once, from elsewhere once the lease has expired.
    monkeypatch.setattr("batchgen.output.lease._is_dead_neighbour", lambda owner: False)
    monkeypatch.setattr("batchgen.output.lease.LEASE_SECONDS", 1.0)
    monkeypatch.setattr("batchgen.output.lease.WATCH_SECONDS", 0.1)
    time.sleep(1.1)
    assert acquire_lease(open_store(url)).still_held()
    assert Ledger(open_store(url)).plan() is None
