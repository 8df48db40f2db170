"""Ray's launcher runs what ray-cluster.yaml says, on a head and a worker; then a job runs there."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cluster import launcher
from tests.cluster.launcher import Machine
from tests.cluster.nodes import until


def nodes_of(machine: Machine) -> int:
    """The number of living nodes, as the cluster reports it."""
    listed = machine.run("ray", "list", "nodes", "--format", "json")
    return listed.stdout.count('"state": "ALIVE"')


@pytest.mark.long
def test_ray_up_and_a_job() -> None:
    words = launcher.missing()
    if words and os.environ.get("CI"):
        pytest.fail(words)
    if words:
        pytest.skip(words)
    with launcher.machine() as machine:
        generated = machine.run("ray", "get-auth-token", "--generate")
        assert generated.returncode == 0, generated.stderr
        up = machine.run("ray", "up", "-y", str(machine.file))
        assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
        until("the worker has joined", lambda: nodes_of(machine) == 2)
        for address in (launcher.HEAD, launcher.WORKER):
            token = machine.disk(address) / ".ray" / "auth_token"
            assert token.read_text() == (machine.home / ".ray" / "auth_token").read_text()
            assert token.stat().st_mode & 0o077 == 0
        source, output = machine.home / "in.parquet", machine.home / "out"
        pq.write_table(pa.table({"prompt": ["a red star"] * 4}), source)
        sizes = ("--steps", "2", "--batch-size", "4", "--no-requirements")
        places = ("--input", str(source), "--output", str(output))
        done = machine.run("batchgen", "submit", *places, *sizes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 images in" in done.stdout
        down = machine.run("ray", "down", "-y", str(machine.file))
        assert down.returncode == 0, down.stdout[-3000:] + down.stderr[-3000:]
        assert "no Ray job server" in machine.run("batchgen", "logs", "x").stderr
