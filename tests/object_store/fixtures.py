"""Fixtures: one server per test process, one bucket per test, a proxy that injects faults."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen.storage import configure
from tests.object_store.proxy import FaultProxy
from tests.object_store.server import PROGRAMS, S3Server, make_bucket, missing

__all__ = ["s3_bucket", "s3_proxy", "s3_server"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    if missing():
        words = f"no S3 server here; `apt-get install {' '.join(PROGRAMS)}` brings one"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    folder = Path(tempfile.mkdtemp(prefix="batchgen-s3-"))
    server = S3Server(folder / "server")
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``s3://`` and the name of a new bucket, which this process's environment can reach."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, name)
    for variable, value in s3_server.exports.items():
        monkeypatch.setenv(variable, value)
    configure()
    yield f"s3://{name}"
    configure()


@pytest.fixture
def s3_proxy(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """Before the server, for the test's bucket; what goes through it can be made to fail."""
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        configure()
        yield proxy
