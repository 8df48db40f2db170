"""What a marker says of a GPU, from a made-up torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batchgen.shard import images


def made_up_torch(tf32: bool = False) -> Any:
    cuda = SimpleNamespace(
        cudnn_sdp_enabled=lambda: False,
        flash_sdp_enabled=lambda: True,
        mem_efficient_sdp_enabled=lambda: True,
        math_sdp_enabled=lambda: True,
        matmul=SimpleNamespace(allow_tf32=False),
    )
    cudnn = SimpleNamespace(version=lambda: 91501, allow_tf32=tf32)
    return SimpleNamespace(
        backends=SimpleNamespace(cuda=cuda, cudnn=cudnn),
        cuda=SimpleNamespace(
            get_device_name=lambda device: "NVIDIA H100 80GB HBM3",
            get_device_capability=lambda device: (9, 0),
        ),
        version=SimpleNamespace(cuda="13.0", hip=None),
    )


def test_a_gpu_is_described_by_all_that_its_bytes_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    driver.write_text("580.95.05\n")
    monkeypatch.setattr(images, "DRIVER", driver)
    monkeypatch.setitem(images.sys.modules, "torch", made_up_torch())
    images.environment.cache_clear()
    found = images.environment("cuda:0")
    images.environment.cache_clear()
    expected = {
        "device": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
        "driver": "580.95.05",
        "cuda": "13.0",
        "cudnn": "91501",
        "attention": "flash, efficient, math",
        "float32": "ieee",
    }
    assert expected.items() <= found.items()


def test_tf32_is_told() -> None:
    assert images._gpu(made_up_torch(tf32=True), "cuda:0")["float32"] == "tf32"
