"""A fake ``nvidia-smi`` that answers as the NVIDIA driver of other machines does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from batchgen.cli import machine
from batchgen.cluster import driver, gpus
from batchgen.cluster.addresses import joined

TABLE = "| NVIDIA-SMI 535.54.03   Driver Version: 535.54.03   CUDA Version: 12.2 |"
MISMATCH = 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18'
T4 = "7.5, 15360, [N/A], Tesla T4"
V100 = "7.0, 16384, [N/A], Tesla V100-SXM2-16GB"
A100 = "8.0, 81920, Disabled, NVIDIA A100-SXM4-80GB"
L40S = "8.9, 46068, [N/A], NVIDIA L40S"
H100 = "9.0, 81559, Disabled, NVIDIA H100 80GB HBM3"
DIVIDED = "9.0, 81559, Enabled, NVIDIA H100 80GB HBM3"


def answers(gpus: Sequence[str]) -> str:
    """A script that lists these GPUs, with the UUIDs ``GPU-0aa``, ``GPU-1aa`` and so on."""
    facts = "\n".join(f"GPU-{number}aa, {gpu}" for number, gpu in enumerate(gpus))
    names = "\n".join(f"535.54.03, {gpu.rpartition(', ')[2]}" for gpu in gpus)
    return (
        f'case "$*" in *compute_cap*) echo "{facts}";; *query*) echo "{names}";; '
        f'*) echo "{TABLE}";; esac'
    )


ANSWERS = answers([L40S])


def fake_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an ``nvidia-smi`` in the path, and nothing that says which devices there are."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(driver, "DEVICE_FILES", folder)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the Ray that tests of this process share, so that a plan is made for this machine."""
    for module in (gpus, machine):
        monkeypatch.setattr(module, "uses_running_ray", lambda address: bool(joined(address)))
