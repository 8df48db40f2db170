"""The main job from s3:// to s3:// on a real server, by its command line; secrets go nowhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.models.find import SHIPPED
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import Store, open_store
from tests.object_store.proxy import FaultProxy, Rule
from tests.object_store.server import KEY, SECRET, S3Server

PLANTED = "planted-9c1f-never-to-be-seen"
MODEL = SHIPPED / "digits-shapes"


def batchgen(*words: str, cwd: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run a command; of ``environment``, None takes a variable away."""
    changed = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "batchgen", *words],
        cwd=cwd,
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_words(bucket: str) -> list[str]:
    return [
        *("run", "--input", f"{bucket}/in", "--output", f"{bucket}/out", "--steps", "2"),
        *("--samples-per-shard", "4", "--batch-size", "4", "--variants", "2"),
        *("--set", "resources.generate.max_replicas=1"),
    ]


@pytest.fixture
def prompts_there(s3_bucket: str, tmp_path: Path) -> str:
    pq.write_table(
        pa.table({"prompt": ["a red star", "a blue circle"] * 3}), tmp_path / "p.parquet"
    )
    open_store(f"{s3_bucket}/in").put("prompts.parquet", (tmp_path / "p.parquet").read_bytes())
    return s3_bucket


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
    """Credentials by references; a slow-down and resets on the way; nothing of it is left."""
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


def test_a_store_that_goes_away_ends_the_job_and_resume_finishes_it(
    prompts_there: str, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    s3_proxy.rules(Rule("error", method="PUT", target="out/data", skip=1))
    done = batchgen(*run_words(prompts_there), *("--set", "storage.patience_s=2"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert f"cannot write {prompts_there}/out/data/train-0000" in done.stderr
    assert f"go on with `batchgen resume {prompts_there}/out`" in done.stderr
    assert "Traceback" not in done.stderr
    ledger = Ledger(open_store(f"{prompts_there}/out"))
    assert len(ledger.states(ledger.require_plan()).committed) == 1
    s3_proxy.rules()
    again = batchgen("resume", f"{prompts_there}/out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert verify(ledger).ok


def test_models_formats_and_exports_in_buckets(prompts_there: str, tmp_path: Path) -> None:
    model = open_store(f"{prompts_there}/model")
    for path in MODEL.rglob("*"):
        if path.is_file():
            model.put(str(path.relative_to(MODEL)), path.read_bytes())
    done = batchgen(
        *run_words(prompts_there),
        *("--model", model.url, "--set", "output.format=webdataset"),
        cwd=tmp_path,
        BATCHGEN_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    target = f"{prompts_there}/exported"
    exported = batchgen("export", f"{prompts_there}/out", target, "--format=parquet", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    for url in (f"{prompts_there}/out", target):
        findings = verify(Ledger(open_store(url)))
        assert findings.ok and findings.accepted == 12, findings.problems
    names = list(open_store(f"{target}/data").list(""))
    assert names and all(name.endswith(".parquet") for name in names)
