"""The Ray that a run starts for itself: who can reach it, and what is left after the run."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from batchgen.cluster import session, sweeper
from batchgen.cluster.join import _init
from batchgen.cluster.ray_token import close_token
from batchgen.errors import UsageError

GONE_WITHIN_S = 10.0
ENDS_WITHIN_S = 180.0  # on a machine that has other work


class Job:
    """`tests.private_job` at a home and a temporary folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.temporary = folder / "t"
        self.temporary.mkdir()
        self.written = folder / "written"
        self.said = folder / "said"
        places = {"HOME": folder, "TMPDIR": self.temporary, "BATCHGEN_CACHE": folder / "cache"}
        self.environment = {**os.environ, **{name: str(path) for name, path in places.items()}}
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            self.environment.pop(name, None)

    def start(self, ending: str, umask: int = 0o022) -> tuple[subprocess.Popen[str], Any]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.private_job", ending, str(self.written)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said.open("a"),
            text=True,
            umask=umask,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, self.said.read_text()
        return process, json.loads(line)

    def left(self) -> list[Path]:
        return [*self.temporary.iterdir(), *self.home.glob(".ray/*")]

    def logs(self) -> list[Path]:
        return list((self.home / "cache" / "ray-logs").glob("session_*/*"))


@pytest.fixture
def job() -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="j", dir="/tmp") as folder:
        yield Job(Path(folder))


def rays_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children(recursive=True) if one.is_running()]


def test_it_is_closed_to_others_and_nothing_of_it_outlives_a_killed_driver(job: Job) -> None:
    process, facts = job.start("wait")
    family = rays_of(process)
    names = {one.name() for one in family}
    assert {"raylet", "gcs_server"} <= names and facts["actor"] in [one.pid for one in family]
    listening = [
        connection.laddr
        for one in [psutil.Process(process.pid), *family]
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert [at for at in listening if not is_loopback(at.ip)] == []
    (folder,) = job.temporary.iterdir()
    assert Path(facts["temporary"]).parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert not (job.home / ".ray").exists()

    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, GONE_WITHIN_S)
    assert alive == []
    assert job.left() == []
    assert job.logs()  # of a driver that died, perhaps for want of memory


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def test_signals_are_the_runs_own_again_once_ray_has_ended(job: Job) -> None:
    """Ray left SIGTERM without a handler: a watchdog's signal killed a run that was ending."""
    process, _ = job.start("signal")
    assert process.stdout is not None
    assert json.loads(process.stdout.read()) == [signal.SIGTERM, signal.SIGINT]
    assert process.wait(ENDS_WITHIN_S) == 0


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_an_orderly_end_leaves_nothing_and_files_follow_the_users_umask(
    job: Job, umask: int, mode: int
) -> None:
    process, _ = job.start("return", umask)
    assert process.wait(ENDS_WITHIN_S) == 0
    assert job.left() == job.logs() == []
    assert stat.S_IMODE(job.written.stat().st_mode) == mode


def test_of_a_run_that_failed_the_last_of_the_logs_is_kept(job: Job) -> None:
    process, facts = job.start("raise")
    assert process.wait(ENDS_WITHIN_S) == 1
    assert job.left() == []
    logs = job.logs()
    assert any(str(facts["actor"]) in log.name for log in logs), logs
    assert all(log.stat().st_size <= sweeper.LOG_BYTES for log in logs)
    assert {stat.S_IMODE(path.stat().st_mode) for path in {log.parent for log in logs}} == {0o700}


def test_two_runs_at_once_have_nothing_in_common(job: Job) -> None:
    first, one = job.start("wait")
    second, two = job.start("return")
    assert one["address"] != two["address"] and one["temporary"] != two["temporary"]
    assert second.wait(ENDS_WITHIN_S) == 0
    assert Path(one["temporary"]).exists() and psutil.pid_exists(one["actor"])
    assert first.stdin is not None
    first.stdin.close()
    assert first.wait(ENDS_WITHIN_S) == 0
    assert job.left() == []


SURROUNDINGS = """
import os
from pathlib import Path
from ray._private import ray_constants
from batchgen.cluster.session import private_session

with private_session() as folder:
    assert "RAY_AUTH_TOKEN" not in os.environ
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == Path(folder).parent and len(token.read_text()) == 64
    assert not ray_constants.ENABLE_RAY_CLUSTER
assert os.environ["RAY_AUTH_TOKEN"] == "of-mine"
assert "RAY_AUTH_MODE" not in os.environ and ray_constants.ENABLE_RAY_CLUSTER
assert not token.parent.exists()
"""


def test_surroundings_are_given_back(job: Job) -> None:
    environment = {**job.environment, "RAY_AUTH_TOKEN": "of-mine"}
    subprocess.run([sys.executable, "-c", SURROUNDINGS], env=environment, check=True)
    assert job.left() == []


@pytest.mark.parametrize(
    ("variable", "given", "expected"),
    [
        ("RAY_TMPDIR", "/tmp/of-mine", "/tmp/of-mine"),
        ("TMPDIR", f"/tmp/{'long' * 20}", "/tmp"),
        ("TMPDIR", "/tmp/short", "/tmp/short"),
    ],
)
def test_its_place_is_the_users_if_sockets_fit(
    monkeypatch: pytest.MonkeyPatch, variable: str, given: str, expected: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(variable, given)
    monkeypatch.setattr(session.os, "makedirs", lambda path, exist_ok: None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [os.environ["TMPDIR"]])
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda dirs=None: os.environ["TMPDIR"])
    assert session._place() == expected


def test_a_ray_that_does_not_start_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_busy(*words: object, **options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", too_busy)
    with pytest.raises(UsageError, match=r"Ray cannot be started on this machine: .* timed out"):
        _init("local", {})


def test_a_token_that_others_may_read_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("t")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    close_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    close_token()


def test_the_sweeper_spares_who_has_nothing_open_there(tmp_path: Path) -> None:
    """Only processes with open files in the folder are ended, except the driver's children."""
    (tmp_path / "log").write_text("")
    neighbour = tmp_path.with_name(f"{tmp_path.name}-neighbour")
    neighbour.write_text("")
    words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    holders = []
    for path in (tmp_path / "log", neighbour):
        with path.open() as file:
            holders.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=file.fileno()))
    inside, _ = holders
    assert sweeper._users_of(str(tmp_path), driver=0) == [inside.pid]
    assert sweeper._users_of(str(tmp_path), driver=os.getpid()) == []
    for process in holders:
        process.send_signal(signal.SIGKILL)
        process.wait()
