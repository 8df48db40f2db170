"""Jobs on a private Ray cluster: submitted, followed, stopped, and queried after its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.cluster.submit import Cluster as Client
from batchgen.errors import SpecError, UsageError
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.object_store.server import free_port

TOKEN = "token-of-this-cluster-never-to-be-seen-0123456789"
UP_WITHIN_S = 60


@dataclass
class Cluster:
    """A head whose job server asks for a token; short paths, since Ray puts sockets there."""

    folder: Path
    port: int
    head: subprocess.Popen[bytes]
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def batchgen(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "batchgen", *words],
            cwd=self.folder,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def stop(self) -> None:
        family = [self.head.pid, *(one.pid for one in psutil.Process(self.head.pid).children(True))]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.head.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="bg-"))
    port = free_port()
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "BATCHGEN_CACHE": str(folder / "cache"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
    }
    environment.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(
        [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *("--port", str(free_port()), "--dashboard-port", str(port), "--num-cpus", "2"),
            *("--dashboard-host", "127.0.0.1", "--temp-dir", str(folder / "ray")),
            *("--object-store-memory", str(512 << 20), "--disable-usage-stats"),
            *("--dashboard-agent-listen-port", str(free_port())),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    one = Cluster(folder, port, head, environment)
    try:
        deadline = time.monotonic() + UP_WITHIN_S
        while "no Ray job server" in one.batchgen("logs", "nothing").stderr:
            assert time.monotonic() < deadline, "the head does not come up"
        yield one
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


def words_of(cluster: Cluster, output: str, rows: int = 8, *more: str) -> list[str]:
    source = cluster.folder / f"{rows}.parquet"
    pq.write_table(pa.table({"prompt": ["a red star"] * rows}), source)
    sizes = ("--samples-per-shard", "4", "--batch-size", "4", "--steps", "2")
    places = ("--input", str(source), "--output", str(cluster.folder / output))
    return ["submit", *places, *sizes, "--no-requirements", *more]


def test_a_job_is_handed_over_and_watched(cluster: Cluster) -> None:
    done = cluster.batchgen(*words_of(cluster, "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 images in" in done.stdout
    assert "INFO" not in done.stderr
    name = re.search(r"submitted (batchgen-\S+) to", done.stderr)
    assert name is not None
    output = cluster.folder / "out"
    findings = verify(Ledger(open_store(str(output))))
    assert findings.ok and findings.accepted == 8
    for job in (name[1], str(output)):
        said = cluster.batchgen("logs", job).stdout
        assert "8 images in" in said
        status = cluster.batchgen("status", job, "--address", cluster.address)
        assert status.returncode == 0, status.stderr
        assert "cluster  succeeded" in status.stdout
        assert "not running" in status.stdout
    assert "has ended already: succeeded" in cluster.batchgen("cancel", name[1]).stdout


def test_a_job_that_fails_gives_its_exit_code(cluster: Cluster) -> None:
    words = words_of(cluster, "bad")
    words[2] = str(cluster.folder / "nowhere.parquet")
    done = cluster.batchgen(*words)
    assert done.returncode == 1
    assert "nowhere.parquet" in done.stdout


@pytest.mark.long
def test_a_job_is_left_alone_and_stopped_from_another_shell(cluster: Cluster) -> None:
    more = ("--no-wait", "--submission-id", "left-alone", "--steps", "50")
    done = cluster.batchgen(*words_of(cluster, "long", 200, *more))
    assert done.returncode == 0 and done.stdout == "left-alone\n", done.stderr
    ledger = Ledger(open_store(str(cluster.folder / "long")))
    deadline = time.monotonic() + 300
    while not ledger.store.list("_batchgen/shards"):
        assert time.monotonic() < deadline, cluster.batchgen("logs", "left-alone").stdout
    running = cluster.batchgen("status", "left-alone")
    assert "cluster  running" in running.stdout and "running: " in running.stdout
    assert running.returncode == 3
    stopped = cluster.batchgen("cancel", str(cluster.folder / "long"))
    assert "stopping left-alone" in stopped.stdout
    followed = cluster.batchgen("logs", "--follow", "left-alone")
    assert followed.returncode == 3
    assert "interrupted; committed shards are kept" in followed.stdout
    assert "not running" in cluster.batchgen("status", "left-alone").stdout  # the lease came back
    assert "interrupted" in ledger.logs()


def test_the_token_is_asked_for_and_not_shown(cluster: Cluster) -> None:
    words = words_of(cluster, "refused")
    for wrong in ({"RAY_AUTH_TOKEN": "wrong"}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}):
        done = cluster.batchgen(*words, **wrong)
        assert done.returncode == 1
        assert "RAY_AUTH_TOKEN" in done.stderr and "auth_token" in done.stderr
        assert "Traceback" not in done.stderr
    everything = b"".join(
        path.read_bytes() for path in (cluster.folder / "out").rglob("*") if path.is_file()
    )
    assert TOKEN.encode() not in everything


def test_without_its_cluster_the_output_answers(cluster: Cluster) -> None:
    output = str(cluster.folder / "out")
    gone = ("--address", "http://127.0.0.1:9")
    for job in (output, cluster.batchgen(*words_of(cluster, "out"), "--no-wait").stdout.strip()):
        logs = cluster.batchgen("logs", job, *gone)
        assert "no Ray job server answers at http://127.0.0.1:9" in logs.stderr
        assert "8 samples in 2 shards" in logs.stdout
        status = cluster.batchgen("status", job, *gone)
        assert "2 of 2 committed" in status.stdout
        cancelled = cluster.batchgen("cancel", job, *gone)
        assert cancelled.returncode == 1
        assert "not running" in cancelled.stderr
        silent = cluster.batchgen("logs", output, RAY_API_SERVER_ADDRESS="")
        assert silent.stderr == "" and silent.stdout == logs.stdout
    nothere = cluster.batchgen("logs", "out/nothere", RAY_API_SERVER_ADDRESS="")
    assert nothere.returncode == 1
    assert "out/nothere is not an output of batchgen: no run has written to it" in nothere.stderr
    unknown = cluster.batchgen("logs", "never-submitted", *gone)
    assert unknown.returncode == 1 and "give the output instead" in unknown.stderr


@pytest.mark.parametrize("given", ["../../../escaped", "a/b", ".hidden", "x\x1b[31m", ""])
def test_a_submission_id_that_is_a_path_is_refused(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A malicious job server or a typing error may give such an id."""
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))
    client = SimpleNamespace(submit_job=lambda **job: given)
    hostile = Client.__new__(Client)
    hostile.address, hostile._client = "http://hostile:8265", client
    with pytest.raises(UsageError, match=r"gave the job the id .* allowed are letters"):
        hostile.resume("out/images", packages=False)
    assert list(tmp_path.rglob("*.output")) == []
    if given:
        with pytest.raises(SpecError, match="--submission-id"):
            hostile._start(["run"], "out/images", {}, {}, given, packages=False)
