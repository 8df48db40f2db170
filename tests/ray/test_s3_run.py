"""The main job from s3:// to s3:// on a real server, by command line; secrets are not leaked."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import Store, open_store
from tests.object_store.proxy import FaultProxy, Rule
from tests.object_store.server import KEY, SECRET, S3Server
from tests.s3_commands import batchgen, prompts_there, run_words

__all__ = ["prompts_there"]  # a fixture

PLANTED = "planted-9c1f-never-to-be-seen"


def everything(store: Store) -> bytes:
    return b"\n".join(store.read(name) for name in store.find(""))


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps logs; its sockets there allow no long path."""
    folder = Path(tempfile.mkdtemp(prefix="bg-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def files_below(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_from_s3_to_s3_with_faults_and_without_a_trace_of_secrets(
    prompts_there: str, s3_proxy: FaultProxy, s3_server: S3Server, tmp_path: Path, ray_folder: Path
) -> None:
    """Credentials are references; requests are slowed down or reset; no secret is left behind."""
    s3_proxy.rules(
        Rule("error", method="PUT", times=4, skip=2),
        Rule("reset", method="GET|HEAD", times=3, skip=6),
        Rule("lost", method="PUT", target="shards/00001", times=1),
    )
    options = f"""storage_options={{s3: {{key: '${{MY_KEY}}', secret: '${{MY_SECRET}}',
        endpoint_url: '{s3_proxy.endpoint}'}}}}"""
    done = batchgen(
        *run_words(prompts_there),
        *("--set", options, "--json"),
        cwd=tmp_path,
        **dict.fromkeys(s3_server.exports),
        MY_KEY=KEY,
        MY_SECRET=SECRET,
        SOME_TOKEN=PLANTED,
        RAY_TMPDIR=str(ray_folder),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted"] == 12
    assert sorted(set(s3_proxy.faults())) == ["error", "lost", "reset"]
    s3_proxy.rules()
    store = open_store(f"{prompts_there}/out")
    findings = verify(Ledger(store))
    assert findings.ok and findings.accepted == 12, findings.problems
    logs = files_below(ray_folder)
    assert logs == b""  # Ray's own end with a run that ends in order
    written = everything(store) + (done.stdout + done.stderr).encode()
    assert b"${MY_SECRET}" in written  # the reference is kept
    written += logs + files_below(tmp_path)
    for secret in (SECRET, KEY, PLANTED):
        assert secret.encode() not in written, secret


def test_a_wrong_secret_ends_at_once_and_is_not_shown(prompts_there: str, tmp_path: Path) -> None:
    done = batchgen(*run_words(prompts_there), cwd=tmp_path, AWS_SECRET_ACCESS_KEY=PLANTED)
    assert done.returncode == 3
    assert "check" in done.stderr and f"{prompts_there}/" in done.stderr
    assert PLANTED not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert open_store(f"{prompts_there}/out").find("") == {}
