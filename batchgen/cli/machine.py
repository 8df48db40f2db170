"""Checks this machine: versions, GPUs, free space, and how far its Ray is open to other users."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from batchgen import __version__
from batchgen.cluster import driver
from batchgen.cluster.gpus import uses_running_ray, weakest
from batchgen.cluster.ray_token import is_open, token_file
from batchgen.plan.choices import SLOW_ON_GPU, dtype_on
from batchgen.plan.plan import Plan
from batchgen.records import DeviceInfo

LIBRARIES = ("torch", "diffusers", "transformers", "ray", "pyarrow")
LITTLE_BYTES = 2 << 30
LISTENING = "0A"  # the state in /proc/net/tcp
RAYS = ("gcs_server", "raylet")
RAY_FOLDER = Path("/tmp/ray")


@dataclass(frozen=True)
class Check:
    """The result of one check. ``grade`` is ``ok``, ``warning`` or ``failed``."""

    name: str
    grade: str
    message: str


def look_round() -> Iterator[Check]:
    """Run all checks of this machine, and yield each result at once."""
    python = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    yield Check("Python", "ok", python)
    yield _libraries()
    yield gpus()
    for name, folder in {"temporary folder": _temporary(), "object store": "/dev/shm"}.items():
        yield from _free(name, folder)
    yield _hugging_face()
    yield _token()
    yield _ports()
    yield _folders()


def _libraries() -> Check:
    found, absent = [f"batchgen {__version__}"], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(f"{name} is not installed")
    return Check("libraries", "failed" if absent else "ok", ", ".join([*found, *absent]))


def gpus() -> Check:
    """List the GPUs that torch can use, or why it cannot use one that is there."""
    seen = driver.seen_by_torch()
    if seen:
        dtype = dtype_on(weakest(driver.visible_gpus()))
        return Check("GPUs", "ok", f"{', '.join(seen)}; model.dtype: auto is {dtype} here")
    if hidden := driver.hidden_gpu():
        return Check("GPUs", "warning", f"{hidden}; {_unusable()}")
    return Check("GPUs", "ok", "none; jobs run on the CPUs")


def device(plan: Plan, address: str | None = None) -> Check:
    """The device that a plan is made for, the dtype there, and whether torch can use the device."""
    found, dtype, elsewhere = plan.device, plan.spec.model.dtype, uses_running_ray(address)
    if found is None:
        said = (
            "the cluster's, which is not asked, since model.dtype and resources.batch_size are set"
        )
        return Check("device", "ok", said)
    parts, troubles = [f"{_described(found)}, {dtype}"], []
    if found.is_gpu and dtype == "float32":
        troubles.append(SLOW_ON_GPU)
    if found.is_gpu and not elsewhere:
        seen = driver.seen_by_torch()
        (parts if seen else troubles).append("torch sees it" if seen else _unusable())
    elif plan.spec.resources.may_use_gpus and not elsewhere and driver.hidden_gpu():
        troubles.append(f"{driver.hidden_gpu()}; {_unusable()}")
    return Check("device", "warning" if troubles else "ok", "; ".join([*parts, *troubles]))


def _described(found: DeviceInfo) -> str:
    if not found.is_gpu:
        return found.name
    known = f"{found.memory_bytes / (1 << 30):.0f} GiB" if found.memory_bytes else "memory unknown"
    return f"{found.name}, {known}"


def _unusable() -> str:
    return f"torch cannot use it: {driver.why_none()}"


def _temporary() -> str:
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def _free(name: str, folder: str) -> Iterator[Check]:
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        grade = "warning" if free < LITTLE_BYTES else "ok"
        yield Check(name, grade, f"{folder} has {gib(free)} free")


def gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.1f} MiB"


def _hugging_face() -> Check:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    models = sorted(path.name for path in folder.glob("models--*"))
    offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else ""
    return Check("models of the hub", "ok", f"{len(models)} in {folder}{offline}")


def _token() -> Check:
    path = token_file()
    if is_open(path):
        fix = f"run `chmod 600 {path}`"
        return Check("Ray's token", "warning", f"other users can read {path}; {fix}")
    if path.exists():
        return Check("Ray's token", "ok", f"{path}, readable only by you")
    return Check("Ray's token", "ok", f"none in {path}; a local run creates its own")


def _ports() -> Check:
    """Find ports of running Ray processes that are open beyond the loopback address."""
    wide = [f"{name} ({pid}) at {at}" for name, pid, at in listening(RAYS) if not _is_loopback(at)]
    if not wide:
        return Check("open ports", "ok", "no Ray process of this machine listens beyond loopback")
    reach = "whoever can reach one and has Ray's token (if there is one) can run code as its owner"
    return Check("open ports", "warning", f"{', '.join(sorted(wide))}: {reach}")


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "[::1]", "[::ffff:127."))


def listening(names: tuple[str, ...]) -> Iterator[tuple[str, int, str]]:
    """Yield name, pid and HOST:PORT of listening sockets of processes of these names (Linux)."""
    sockets = dict(_sockets())
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (folder / "comm").read_text().strip()
            if name in names:
                for one in (folder / "fd").iterdir():
                    if at := sockets.get(os.readlink(one)):
                        yield name, int(folder.name), at


def _sockets() -> Iterator[tuple[str, str]]:
    """Yield ``socket:[INODE]`` and HOST:PORT of listening sockets."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING:
                    yield f"socket:[{fields[9]}]", _address(*fields[1].split(":"))


def _address(host: str, port: str) -> str:
    """Decode an address of /proc/net: hexadecimal words in this machine's byte order."""
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{int(port, 16)}"


def _folders() -> Check:
    """Find session folders that others can write: Ray makes them so, except in local runs."""
    found = [path for path in RAY_FOLDER.glob("session_2*") if _is_for_others(path)]
    if not found:
        return Check("Ray's folders", "ok", f"none in {RAY_FOLDER} that other users can write")
    return Check(
        "Ray's folders",
        "warning",
        f"other users can write to {len(found)} in {RAY_FOLDER}, with logs and sockets: remove "
        "those of clusters that have ended, and run `chmod 700` on the others",
    )


def _is_for_others(path: Path) -> bool:
    try:
        return bool(stat.S_IMODE(path.stat().st_mode) & 0o022)
    except OSError:
        return False
