"""`clean` and `doctor` on local disks and in memory (on a real object store: test_s3_*)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem

from batchgen.cli import doctor, machine, main, memory
from batchgen.cluster import driver
from batchgen.engine import batch_size
from batchgen.errors import InputError, ModelError, OutputBusy
from batchgen.output import clean
from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import Ledger
from batchgen.plan.choices import SLOW_ON_GPU
from batchgen.records import DeviceInfo
from batchgen.storage import TEMPORARY, Store, open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_prompts
from tests.fake_driver import ANSWERS, MISMATCH, fake_smi, without_ray


def others_lease() -> bytes:
    """Another run's lease, renewed when it is needed, so that slow tests do not expire it."""
    tree = {"owner": "other", "renewed_at": time.time(), "released": False}
    return json.dumps(tree).encode()


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def finished(tmp_path: Path) -> Ledger:
    source = write_prompts(tmp_path / "in.parquet", 5)
    plan = plan_for(source, tmp_path / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    return ledger


def test_clean_removes_temporary_files_alone(finished: Ledger) -> None:
    store = finished.store
    before = store.find("data")
    Path(store.path(TEMPORARY)).mkdir(parents=True, exist_ok=True)
    Path(store.path(f"{TEMPORARY}/half")).write_bytes(b"1")
    assert clean.clean(finished, dry_run=True).temporary_files == ("half",)
    assert store.list(TEMPORARY) == {"half": 1}
    result = invoke("clean", store.url)
    assert result.exit_code == 0 and "removed 0 unfinished uploads and 1 temp" in result.output
    assert store.list(TEMPORARY) == {}
    assert store.find("data") == before


def test_clean_leaves_a_living_run_alone(finished: Ledger) -> None:
    acquire_lease(finished.store)
    with pytest.raises(OutputBusy, match="is held by another run"):
        clean.clean(finished)


def test_clean_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run has started there"):
        clean.clean(Ledger(open_store(str(tmp_path))))


def test_doctor_tries_everything_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 5)
    output = tmp_path / "out"
    result = invoke("doctor", "--input", str(source), "--output", str(output), "--json")
    assert result.exit_code == 0
    checks = json.loads(result.stdout)
    assert [check["grade"] for check in checks] == ["ok"] * 7, checks
    assert checks[1] == {"name": "first rows", "grade": "ok", "message": "5 of 5 can be generated"}
    assert "5 images as png need up to" in checks[-1]["message"]
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_doctor_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = invoke("doctor", "--input", "nowhere", "--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "failed   input and model: input " in result.output
    assert "nowhere: no such file or folder" in result.output
    assert "Not a directory" in result.output


def test_doctor_tries_the_first_rows(tmp_path: Path) -> None:
    captions = write_prompts(tmp_path / "captions.parquet", 20)
    words = ("doctor", "--input", str(captions), "--output", str(tmp_path / "out"), "--json")
    result = invoke(*words, "--task", "image-to-image", "--image-column", "prompt")
    assert result.exit_code == 1
    rows = next(one for one in json.loads(result.stdout) if one["name"] == "first rows")
    assert rows["grade"] == "failed"
    assert rows["message"].startswith("8 of 8 would be rejected: 8 "), rows
    pq.write_table(pa.table({"prompt": ["a star", "", "a ring"]}), captions)
    rows = json.loads(invoke(*words).stdout)[1]
    assert rows["grade"] == "warning"
    assert "1 of 3 would be rejected: 1 empty-prompt (" in rows["message"]


def test_doctor_tries_regions_of_the_wrong_shape(tmp_path: Path) -> None:
    source, model = tmp_path / "in.parquet", tmp_path / "model"
    boxes = [[{"phrase": "a star", "box": [0.1, 0.2]}]] * 3
    pq.write_table(pa.table({"prompt": ["a star"] * 3, "regions": boxes}), source)
    made = invoke("models", "make-tiny", "control", str(model), "--family", "gligen")
    assert made.exit_code == 0, made.output
    words = ("--task", "control", "--model", str(model), "--output", str(tmp_path / "out"))
    regions = ("--set", "input.columns.regions=regions")
    result = invoke("doctor", "--input", str(source), *words, *regions)
    assert result.exit_code == 1
    assert "failed   first rows: 3 of 3 would be rejected: 3 bad-regions (" in result.output


def test_doctor_sees_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "in.parquet", 5)
    words = ("doctor", "--input", str(source), "--output", str(tmp_path / "a/b/c"), "--json")
    for free, grade in ((300_000, "failed"), (doctor.RESERVE_BYTES + 10_000, "warning")):
        space = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, space=space: space)
        result = invoke(*words)
        checks = {one["name"]: one for one in json.loads(result.stdout)}
        assert checks["output: free space"]["grade"] == grade
        assert result.exit_code == (grade == "failed")


def test_doctor_alone_looks_at_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    token.write_text("t")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setattr(machine, "RAY_FOLDER", tmp_path)
    (tmp_path / "session_2026").mkdir()
    (tmp_path / "session_2026").chmod(0o777)
    checks = {one["name"]: one for one in json.loads(invoke("doctor", "--json").stdout)}
    assert set(checks) > {"Python", "GPUs", "temporary folder", "models of the hub", "open ports"}
    assert torch.__version__ in checks["libraries"]["message"]
    assert checks["Ray's token"]["grade"] == "warning"
    assert f"chmod 600 {token}" in checks["Ray's token"]["message"]
    assert f"other users can write to 1 in {tmp_path}" in checks["Ray's folders"]["message"]
    token.chmod(0o600)
    (tmp_path / "session_2026").chmod(0o700)
    checks = {one["name"]: one for one in json.loads(invoke("doctor", "--json").stdout)}
    assert checks["Ray's token"]["grade"] == checks["Ray's folders"]["grade"] == "ok"


@pytest.mark.parametrize(
    ("host", "wide"), [("127.0.0.1", 0), ("0.0.0.0", 1), ("::1", 0), ("::", 1)]
)
def test_doctor_names_ports_beyond_loopback(
    monkeypatch: pytest.MonkeyPatch, host: str, wide: int
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        me = Path("/proc/self/comm").read_text().strip()
        at = f"[{host}]" if ":" in host else host
        mine = (me, os.getpid(), f"{at}:{server.getsockname()[1]}")
        assert mine in list(machine.listening((me,)))
        monkeypatch.setattr(machine, "listening", lambda names: iter([mine]))
        check = machine._ports()
        assert (check.grade == "warning") == bool(wide)
        assert (mine[2] in check.message) == bool(wide)


def test_doctor_tells_of_a_gpu_that_torch_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, ANSWERS, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = machine.gpus()
    assert check.grade == "warning" and "NVIDIA L40S" in check.message
    assert f"torch {torch.__version__} is built" in check.message


def a_card(monkeypatch: pytest.MonkeyPatch, is_usable: bool) -> None:
    """What torch says about a GPU that it can use, or cannot."""
    card = SimpleNamespace(name="NVIDIA L40S", total_memory=45 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)


def test_plan_and_doctor_show_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_prompts(tmp_path / "in.parquet", 5)
    words = ("--input", str(source), "--output", str(tmp_path / "out"))

    def shown(*more: str) -> tuple[str, str]:
        """The line of `plan`, and the grade of the same line in `doctor`."""
        lines = invoke("plan", *words, *more).stdout.splitlines()
        (line,) = [one for one in lines if one.startswith("device")]
        checks = json.loads(invoke("doctor", *words, *more, "--json").stdout)
        (check,) = [one for one in checks if one["name"] == "device"]
        assert line == f"device   {check['message']}"
        return line.removeprefix("device   "), check["grade"]

    def not_computed(*asked: object) -> NoReturn:
        raise ModelError("another process computes the memory, which takes seconds")

    for module in (memory, batch_size):
        monkeypatch.setattr(module, "need_of", not_computed)
    without_ray(monkeypatch)
    fake_smi(tmp_path, "exit 6", monkeypatch)
    assert shown() == ("CPU, float32", "ok")
    fake_smi(tmp_path, ANSWERS, monkeypatch)
    a_card(monkeypatch, is_usable=True)
    assert shown() == ("NVIDIA L40S, 45 GiB, bfloat16; torch sees it", "ok")
    assert "model.dtype: auto is bfloat16 here" in machine.gpus().message
    line, grade = shown("--dtype", "float32")
    assert line == f"NVIDIA L40S, 45 GiB, float32; torch sees it; {SLOW_ON_GPU}"
    assert grade == "warning"
    assert shown("--set", "resources.generate.num_gpus=0") == ("CPU, float32", "ok")
    a_card(monkeypatch, is_usable=False)
    line, grade = shown()
    why = f"torch cannot use it: torch {torch.__version__} is built"
    assert line.startswith(f"NVIDIA L40S, 45 GiB, bfloat16; {why}")
    assert grade == "warning"
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    assert shown("--dtype", "float16", "--batch-size", "4") == (
        "the cluster's, which is not asked, since model.dtype and resources.batch_size are set",
        "ok",
    )


def test_a_gpu_that_the_driver_cannot_tell_of_is_shown_as_one_that_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_prompts(tmp_path / "in.parquet", 5)
    without_ray(monkeypatch)
    fake_smi(tmp_path, MISMATCH, monkeypatch)
    (tmp_path / "nvidia0").touch()
    a_card(monkeypatch, is_usable=False)
    said = invoke("plan", "--input", str(source), "--output", str(tmp_path / "out")).stdout
    assert f"device   CPU, float32; {tmp_path}/nvidia0; the NVIDIA driver does not answer" in said
    a_card(monkeypatch, is_usable=True)  # torch can use it all the same, so it is asked
    assert driver.visible_gpus() == [DeviceInfo("NVIDIA L40S", 45 << 30, (8, 9))]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert driver.visible_gpus() == [DeviceInfo("NVIDIA L40S", 45 << 30)]
    (tmp_path / "nvidia0").rename(tmp_path / "kfd")  # the device file of AMD's driver
    assert driver.visible_gpus() == [DeviceInfo("NVIDIA L40S", 45 << 30)]
    (tmp_path / "kfd").unlink()
    assert driver.visible_gpus() == []


class Careless(MemoryFileSystem):
    """A store that overwrites an object that it should only create, as some S3 servers do."""

    cachable = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        return super().pipe_file(path, value, mode="overwrite", **kwargs)


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("batchgen.output.lease.SETTLE_SECONDS", 0.05)
    return Store(Careless(), f"/{uuid.uuid4().hex}", "careless://", local=False)


def test_doctor_warns_of_a_store_without_create_only_writes(careless: Store) -> None:
    grade, message = doctor._exclusive(careless)
    assert grade == "warning" and "overwrite" in message


def test_where_names_are_taken_twice_the_last_writer_holds_the_lease(
    careless: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert acquire_lease(careless).still_held()
    real_sleep = time.sleep

    def other_takes_it_too(seconds: float) -> None:
        careless.put("_batchgen/lease/00002.json", others_lease())
        real_sleep(seconds)

    Ledger(careless).store.put(
        "_batchgen/lease/00001.json",
        json.dumps({"owner": "x", "renewed_at": 0, "released": True}).encode(),
    )
    monkeypatch.setattr("batchgen.output.lease.time.sleep", other_takes_it_too)
    with pytest.raises(OutputBusy, match=r"another run \(host other, pid"):
        acquire_lease(careless)
