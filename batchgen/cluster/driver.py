"""Asks the NVIDIA driver and torch for this machine's GPUs, and why torch cannot use one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from batchgen.records import DeviceInfo

ASK_WITHIN_S = 20.0
DEVICE_FILES = Path("/dev")
OTHER_DRIVERS = ("kfd", "dxg")  # device files of AMD's driver, and of Windows' in WSL
WHEELS = "https://pytorch.org/get-started/locally"
FACTS = "uuid,compute_cap,memory.total,mig.mode.current,name"


def visible_gpus() -> list[DeviceInfo]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES does not hide.

    torch is loaded and asked only if there may be GPUs that the driver does not list: those of AMD,
    and those of a driver that is too old to know ``compute_cap``.
    """
    if _hides_all():
        return []
    if listed := _listed():
        return _left_visible(listed)
    others = any((DEVICE_FILES / name).exists() for name in OTHER_DRIVERS)
    return _known_to_torch() if others or _device_files() else []


def _listed() -> dict[str, DeviceInfo]:
    """UUID -> GPU, in the driver's order; empty if the driver does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    ask = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader,nounits"]
    try:
        rows = [line.split(", ", 4) for line in _said(ask).splitlines()]
        return {row[0]: _gpu(*row[1:]) for row in rows}
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return {}


def _gpu(capability: str, mebibytes: str, mig: str, name: str) -> DeviceInfo:
    """A GPU from the driver's words. Of one that is divided (MIG), a replica gets only a part."""
    major, _, minor = capability.partition(".")
    is_known = mebibytes.isdigit() and mig != "Enabled"
    return DeviceInfo(name, int(mebibytes) << 20 if is_known else 0, (int(major), int(minor)))


def _hides_all() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")


def _left_visible(listed: dict[str, DeviceInfo]) -> list[DeviceInfo]:
    """The GPUs that CUDA_VISIBLE_DEVICES names.

    CUDA's own numbers begin with the fastest GPU, the driver's follow the PCI bus. So where GPUs
    differ, numbers are understood only with CUDA_DEVICE_ORDER=PCI_BUS_ID; otherwise any may be
    meant.
    """
    gpus = list(listed.values())
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return gpus
    in_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(set(gpus)) == 1
    visible: list[DeviceInfo] = []
    for word in (one.strip() for one in named.split(",")):
        if word.isdigit() and int(word) < len(gpus):
            found = [gpus[int(word)]] if in_order else gpus
        elif word.startswith("MIG-"):
            found = [replace(gpu, memory_bytes=0) for gpu in gpus]
        else:
            found = [gpu for uuid, gpu in listed.items() if word and uuid.startswith(word)]
        if not found:
            break  # CUDA ignores what follows a word that names no GPU
        visible += found
    return visible


def _known_to_torch() -> list[DeviceInfo]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    is_cuda = torch.version.hip is None  # AMD's numbers are not comparable
    return [
        DeviceInfo(one.name, one.total_memory, (one.major, one.minor) if is_cuda else None)
        for one in found
    ]


def seen_by_torch() -> list[str]:
    """Names and memory of the GPUs that torch can use in this process."""
    return [f"{one.name} ({one.memory_bytes >> 30} GiB)" for one in _known_to_torch()]


def why_none() -> str:
    """Why torch finds no GPU in this process."""
    import torch

    return why_unusable(torch.__version__, torch.version.cuda, driver())


@dataclass(frozen=True)
class Driver:
    """The answer of ``nvidia-smi``; if there is none, ``trouble`` says why."""

    gpus: tuple[str, ...] = ()
    version: str = ""
    cuda: str = ""
    trouble: str = ""

    def __str__(self) -> str:
        if self.trouble:
            return self.trouble
        return f"driver {self.version} for CUDA up to {self.cuda or 'unknown'}"


def driver() -> Driver:
    """The NVIDIA driver of this machine and the GPUs that it lists."""
    if shutil.which("nvidia-smi") is None:
        return Driver(trouble="there is no NVIDIA driver (no nvidia-smi)")
    ask = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        lines = _said(ask).splitlines()
        found = re.search(r"CUDA Version:\s*([\d.]+)", _said(["nvidia-smi"]))
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stdout", None) or str(error)
        return Driver(trouble=f"the NVIDIA driver does not answer ({' '.join(words.split())})")
    rows = [line.partition(", ") for line in lines if ", " in line]
    if not rows:
        return Driver(trouble="the NVIDIA driver lists no GPU")
    names = tuple(name for _, _, name in rows)
    return Driver(names, rows[0][0], found[1] if found else "")


def _said(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_WITHIN_S, check=True)
    return done.stdout


def why_unusable(torch_version: str, built_for: str | None, found: Driver) -> str:
    """Versions of torch, CUDA and driver in one sentence, with what to change."""
    if built_for is None:
        return (
            f"torch {torch_version} is built without CUDA (this machine: {found}); install a torch "
            f"wheel for CUDA ({WHEELS})"
        )
    wheel = f"torch {torch_version} is built for CUDA {built_for} (this machine: {found})"
    if found.cuda and _numbers(found.cuda) < _numbers(built_for)[:1]:
        return (
            f"{wheel}: the driver is too old; update it, or install a torch wheel for its CUDA "
            f"version ({WHEELS})"
        )
    return (
        f"{wheel}: check whether `nvidia-smi` and `python -m torch.utils.collect_env` list the GPU"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def hidden_gpu() -> str:
    """Describes this machine's GPUs; empty if there is none, or CUDA_VISIBLE_DEVICES hides all.

    It is called where Ray or torch found no GPU. Hiding them is taken as a choice of the user.
    """
    if _hides_all():
        return ""
    files, found = _device_files(), driver()
    if not found.gpus and not files:
        return ""
    return f"{', '.join(found.gpus) or files[0]}; {found}"


def _device_files() -> list[Path]:
    return sorted(DEVICE_FILES.glob("nvidia[0-9]*"))
