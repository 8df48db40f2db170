"""Compiled code: kept by torch on each machine, and shared between machines where a user says.

Compiled code is executed, and torch unpickles it to load it. So it is loaded only from a folder
that nobody else can write to, and from the place that ``BATCHGEN_COMPILE_CACHE`` names in the
replica's environment. A spec cannot name that place: it may come from an output of somebody else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchgen import __version__
from batchgen.errors import InputError, ModelError, RetryShard, StorageFailed
from batchgen.storage import open_store
from batchgen.storage.cache import CACHE, cache_folder

SHARED = "BATCHGEN_COMPILE_CACHE"  # environment variable with a folder or URL; read by each replica
KEPT_BY_TORCH = "TORCHINDUCTOR_CACHE_DIR"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "torchao")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Compiled:
    """What a replica did to get compiled code.

    Attributes:
        seconds: time from the lock to the end of the warm-up.
        graphs: functions in use.
        fresh: those of them that torch compiled; the others came from its cache.
        shared: the place that the code was loaded from or saved to, or why it was not.
    """

    seconds: float
    graphs: int
    fresh: int
    shared: str = ""


def choose_folder() -> None:
    """Choose the folder of compiled code; torch must not have compiled anything before.

    Raises:
        ModelError: the folder of compiled code can be written by others.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch's own default is in /tmp, under a name that is known to all users.
    if os.environ.get(KEPT_BY_TORCH, default_cache_dir()) == default_cache_dir():
        os.environ[KEPT_BY_TORCH] = str(_private(cache_folder() / "compiled"))


def warmed(facts: Mapping[str, Any], device: str, run: Callable[[], None]) -> Compiled:
    """Call ``run``, which compiles; code that another replica compiled is used if there is any.

    On one machine, one replica with these facts compiles at a time; those that wait for it find the
    code in torch's cache. Replicas on different machines that start at once do not wait for each
    other: each would wait as long as it compiles.

    Args:
        facts: what the code depends on, apart from versions and the device.
        device: torch's name of the device.
        run: calls the model in every shape that it will have.

    Raises:
        StorageFailed: the shared place cannot be read.
    """
    key = _key(facts, device)
    place = os.environ.get(SHARED, "")
    with _one_at_a_time(Path(os.environ[KEPT_BY_TORCH]), key):
        begun, before = time.monotonic(), _counts()
        said = _load(place, key) if place else ""
        run()
        graphs, fresh = (now - then for now, then in zip(_counts(), before, strict=True))
        seconds = time.monotonic() - begun
        _end_helpers()
        if place and not said:
            said = _save(place, key)
    return Compiled(seconds, graphs, fresh, said)


def _key(facts: Mapping[str, Any], device: str) -> str:
    """A name for code of these facts, versions and device.

    It only finds the file: torch checks for each function in it whether it fits.
    """
    import torch

    kind: Any = (platform.machine(), torch.backends.cpu.get_cpu_capability())
    if device != "cpu":
        kind = (torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    versions = {name: _version(name) for name in PACKAGES}
    whole = [__version__, platform.python_version(), versions, kind, facts]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _counts() -> tuple[int, int]:
    """Functions that torch has captured in this process, and those that it has compiled."""
    from torch._dynamo.utils import counters

    fresh = (
        counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
    )
    return counters["stats"]["unique_graphs"], fresh


def _end_helpers() -> None:
    """End the processes in which torch compiled; each holds a Python with torch."""
    from torch._inductor.async_compile import shutdown_compile_workers

    shutdown_compile_workers()


def _load(place: str, key: str) -> str:
    """Load the code of this name into torch's cache; returns what to tell, empty if none is there.

    A damaged file stays: another replica may just be reading it, and the store may be read-only.
    """
    import torch

    try:
        data = open_store(place).read(f"{key}.bin")
    except FileNotFoundError:
        return ""
    except RetryShard as error:
        raise StorageFailed(f"{SHARED}: {error}") from None
    if torch.compiler.load_cache_artifacts(data) is None:
        return f"not loaded: {key}.bin in {place} is damaged; remove it, and it is saved again"
    return f"loaded from {place}"


def _save(place: str, key: str) -> str:
    """Save the code of this process, unless another replica has; returns what to tell."""
    import torch

    made = torch.compiler.save_cache_artifacts()
    if made is None:
        return ""
    try:
        is_first = open_store(place).put_new(f"{key}.bin", made[0])
    except (RetryShard, StorageFailed, InputError) as error:  # it may be for reading only
        return f"not saved: {error}"
    return f"saved to {place}" if is_first else f"another replica saved it to {place}"


@contextmanager
def _one_at_a_time(folder: Path, key: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _private(folder: Path) -> Path:
    """Create the folder, or check that only this user can write to it.

    Raises:
        ModelError: others can write to it, or it cannot be created.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found, above = folder.stat(), folder.parent.stat()
    except OSError as error:
        raise ModelError(
            f"the folder of compiled code {folder} cannot be created: {error.strerror}; set "
            f"{CACHE} to another folder"
        ) from error
    is_foreign = found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE
    if is_foreign or (above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX):
        raise ModelError(
            f"the folder of compiled code {folder} can be changed by other users, and what is in "
            f"it is executed: remove their access, or set {CACHE} to another folder"
        )
    return folder
