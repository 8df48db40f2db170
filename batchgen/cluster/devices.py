"""Finds the GPUs of a replica, and explains why torch or Ray cannot use an existing GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import ray

from batchgen.cluster.session import is_private
from batchgen.errors import ModelError, UsageError
from batchgen.spec.spec import Spec

ASK_WITHIN_S = 20.0
DEVICE_FILES = Path("/dev")
WHEELS = "https://pytorch.org/get-started/locally"


def devices() -> list[str]:
    """The devices that Ray reserved for this actor: ``cuda:0``, ...; ``cpu`` if it has no GPU.

    Raises:
        ModelError: torch cannot use them. (On the CPU the job would take a hundred times as long.)
    """
    given = len(ray.get_gpu_ids()) if ray.is_initialized() else 0
    if not given:
        return ["cpu"]
    seen = len(seen_by_torch())
    if seen < given:
        raise ModelError(
            f"this replica has {given} GPU of {os.uname().nodename} reserved, but torch can use "
            f"{seen} of them: {why_none()}; or run on CPUs with num_gpus: 0 in each pool of "
            "resources"
        )
    return [f"cuda:{number}" for number in range(given)]


def seen_by_torch() -> list[str]:
    """Names and memory of the GPUs that torch can use in this process."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return [f"{one.name} ({one.total_memory >> 30} GiB)" for one in properties]


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


def memory_of_gpus() -> list[tuple[str, int]]:
    """Name and total bytes of memory of each GPU that ``nvidia-smi`` lists, without torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return []
    ask = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        rows = [line.partition(", ") for line in _said(ask).splitlines()]
    except (OSError, subprocess.SubprocessError):
        return []
    return [(name, int(mib) << 20) for mib, _, name in rows if mib.isdigit()]


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

    It is called where Ray found no GPU. Hiding them is taken as a choice of the user.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return ""
    files = sorted(DEVICE_FILES.glob("nvidia[0-9]*"))
    found = driver()
    if not found.gpus and not files:
        return ""
    return f"{', '.join(found.gpus) or files[0]}; {found}"


def refuse_hidden_gpu(spec: Spec) -> None:
    """Refuse to run silently on the CPU if this machine has a GPU that Ray does not find.

    It applies only to a run that starts Ray here.

    Raises:
        UsageError: there is such a GPU, and the spec does not set ``num_gpus: 0``.
    """
    resources = spec.resources
    staged = (resources.encode, resources.denoise, resources.decode)
    pools = [resources.generate] if resources.layout == "fused" else staged
    if not is_private() or all(pool.num_gpus == 0 for pool in pools):
        return
    if ray.cluster_resources().get("GPU"):
        return
    if what := hidden_gpu():
        names = "generate" if resources.layout == "fused" else "encode, denoise and decode"
        raise UsageError(
            f"this machine has a GPU that Ray does not find ({what}), so the job would run on the "
            f"CPU; fix the driver, or set num_gpus: 0 in resources.{names} to run on the CPU"
        )
