"""A GPU that torch or Ray cannot use stops the run at once; the run never falls back to the CPU."""

from __future__ import annotations

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
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
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
