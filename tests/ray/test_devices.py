"""A GPU that torch or Ray cannot use stops the run at once; the run never falls back to the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.util.accelerators import accelerators

from batchgen.cluster import devices
from batchgen.cluster.accelerators import KNOWN
from batchgen.cluster.devices import refuse_hidden_gpu
from batchgen.cluster.driver import Driver, driver, hidden_gpu, seen_by_torch, why_unusable
from batchgen.errors import ModelError, UsageError
from batchgen.output.ledger import Ledger
from batchgen.plan.choices import SLOW_ON_GPU
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from tests.datasets_on_disk import write_prompts
from tests.fake_driver import ANSWERS, MISMATCH, fake_smi


def spec_of(**pool: object) -> Spec:
    return build(
        {"input": {"path": "in"}, "output": {"url": "out"}, "resources": {"generate": dict(pool)}}
    )


def test_the_driver_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, ANSWERS, monkeypatch)
    assert driver() == Driver(("NVIDIA L40S",), "535.54.03", "12.2")
    fake_smi(tmp_path, MISMATCH, monkeypatch)
    assert "does not answer (Failed to initialize NVML: Driver/library" in driver().trouble
    monkeypatch.setenv("PATH", "")
    assert "no nvidia-smi" in driver().trouble


@pytest.mark.parametrize(
    ("wheel", "cuda", "found", "said"),
    [
        ("2.13.0+cpu", None, Driver(("L40S",), "535.54", "12.2"), "install a torch wheel for"),
        ("2.13.0+cpu", None, Driver(trouble="no driver"), "(this machine: no driver)"),
        ("2.13.0", "13.0", Driver(("L40S",), "535.54", "12.2"), "the driver is too old"),
        ("2.8.0", "12.8", Driver(("L40S",), "535.54", "12.2"), "check whether `nvidia-smi`"),
    ],
)
def test_why_torch_sees_none(wheel: str, cuda: str | None, found: Driver, said: str) -> None:
    why = why_unusable(wheel, cuda, found)
    assert wheel in why and said in why and str(found) in why


def test_a_replica_with_gpus_that_torch_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    assert devices.devices() == ["cpu"]
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0, 1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="L40S", total_memory=48 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert seen_by_torch() == ["L40S (48 GiB)"] * 2
    assert devices.devices() == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match=r"has 2 GPU of .* reserved, but torch can use 1 of them"):
        devices.devices()


def test_a_gpu_that_ray_does_not_find_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(devices, "is_private", lambda: True)
    fake_smi(tmp_path, ANSWERS, monkeypatch)
    with pytest.raises(UsageError, match=r"NVIDIA L40S; driver 535.54.03 for CUDA up to 12.2"):
        refuse_hidden_gpu(spec_of())
    refuse_hidden_gpu(spec_of(num_gpus=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refuse_hidden_gpu(spec_of())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    refuse_hidden_gpu(spec_of())


def test_a_machine_without_a_gpu_may_have_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, 'echo "No devices were found"; exit 6', monkeypatch)
    assert hidden_gpu() == ""
    (tmp_path / "nvidia0").touch()
    assert hidden_gpu().startswith(f"{tmp_path}/nvidia0; the NVIDIA driver does not answer (No dev")


def test_every_gpu_of_nvidia_that_ray_names_is_known() -> None:
    names = {name for kind, name in vars(accelerators).items() if kind.startswith("NVIDIA_")}
    assert len(names) > 10 and names <= KNOWN.keys()


RUN = """
import ray, sys
from batchgen import runner
from batchgen.errors import StopJob
from batchgen.spec.build import build
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
try:
    words = dict(zip(("input", "output"), sys.argv[1:]))
    runner.run(build({**words, "model": {"dtype": sys.argv[3]}}))
except StopJob as error:
    print(error.exit_code, error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use the GPU")
@pytest.mark.parametrize(("dtype", "planned"), [("auto", "bfloat16"), ("float32", "float32")])
def test_a_run_on_a_gpu_that_torch_cannot_use_ends_at_once(
    tmp_path: Path, dtype: str, planned: str
) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(source), str(tmp_path / "out"), dtype],
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = done.stdout.splitlines()[-1]
    assert said.startswith("1 ") and torch.__version__ in said and "GPU of" in said, done.stderr
    assert "it retries while" not in done.stdout + done.stderr
    assert not list((tmp_path / "out").glob("data/*"))
    assert Ledger(open_store(str(tmp_path / "out"))).require_plan().spec.model.dtype == planned
    assert done.stderr.count(SLOW_ON_GPU) == (dtype == "float32"), done.stderr


JOIN = """
import ray, subprocess, sys
ray.init("local", num_cpus=2, num_gpus=1, resources={"accelerator_type:T4": 1},
         include_dashboard=False, log_to_driver=False)
words = ["--address", ray.get_runtime_context().gcs_address, *sys.argv[1:]]
done = subprocess.run([sys.executable, "-m", "batchgen", "run", *words])
raise SystemExit(done.returncode)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Ray names the GPU")
def test_a_cluster_is_asked_for_its_gpus_before_the_plan(tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 4)
    words = ["--input", str(source), "--output", str(tmp_path / "out")]

    def joined(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", JOIN, *words, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    done = joined("--dry-run")
    assert "device   T4, 14 GiB, float16\n" in done.stdout, done.stderr
    done = joined()  # it joins once more for the run, whose replica finds no GPU here
    assert done.returncode == 1 and "GPU of" in done.stderr, done.stderr
    assert Ledger(open_store(str(tmp_path / "out"))).require_plan().spec.model.dtype == "float16"


LOCAL_RUN = """
import sys
from batchgen import runner
from batchgen.errors import UsageError
from batchgen.spec.build import build
try:
    runner.run(build({"input": {"path": sys.argv[1]}, "output": {"url": sys.argv[2]}}), quiet=True)
except UsageError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Ray finds the GPU")
def test_a_local_run_beside_a_gpu_that_ray_does_not_find_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, ANSWERS, monkeypatch)
    source = write_prompts(tmp_path / "in.parquet", 4)
    words = [sys.executable, "-c", LOCAL_RUN, str(source), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert "a GPU that Ray does not find (NVIDIA L40S; driver 535.54.03" in done.stdout, done.stderr
