"""A separate process that cleans up after the driver: it ends leftover Ray processes.

    python -I -S sweeper.py FOLDER DRIVER KEEP

It waits until its standard input is closed, by the driver or, if that was killed, by the kernel.
A byte written before says how the run ended. Then it ends the processes that still use FOLDER and
removes FOLDER: two of Ray's processes, the agents, outlive a killed raylet by half a minute. If the
run did not end normally, the ends of Ray's logs are kept in KEEP.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

ORDERLY, FAILED = b".", b"!"
LOOK_EVERY_S = 0.02
LOOK_FOR_S = 5.0
LOOK_AFTER_DEATH_S = 3.0  # a process that has just been started has not opened its files yet
LOG_BYTES = 256 << 10
SESSIONS_KEPT = 5


def sweep(folder: str, driver: int, keep: Path) -> None:
    """Wait for the driver's end, then end leftover processes and remove the folder."""
    ending = sys.stdin.buffer.read()
    until = time.monotonic() + (LOOK_FOR_S if ending else LOOK_AFTER_DEATH_S)
    while time.monotonic() < until:
        left = _users_of(folder, driver)
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if ending and not left:
            break
        time.sleep(LOOK_EVERY_S)
    if ending != ORDERLY:
        with suppress(OSError):
            _keep_logs(Path(folder), keep)
    shutil.rmtree(folder, ignore_errors=True)


def _users_of(folder: str, driver: int) -> list[int]:
    """Processes with open files in the folder, except the driver and its children."""
    found = []
    if not os.path.isdir("/proc/self/fd"):
        return []  # not Linux: the agents end by themselves, later
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with suppress(OSError, ValueError):
            opened = os.scandir(f"/proc/{pid}/fd")
            with opened:
                uses = any(os.readlink(one.path).startswith(f"{folder}/") for one in opened)
            if uses and driver not in (pid, _parent_of(pid)):
                found.append(pid)
    return found


def _parent_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def _keep_logs(folder: Path, keep: Path) -> None:
    for logs in folder.glob("*/session_2*/logs"):
        place = keep / logs.parent.name
        place.mkdir(parents=True, mode=0o700, exist_ok=True)
        for log in filter(Path.is_file, logs.iterdir()):
            if log.stat().st_size:
                (place / log.name).write_bytes(_tail(log))
    for old in sorted(keep.iterdir())[:-SESSIONS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(-min(LOG_BYTES, log.stat().st_size), os.SEEK_END)
        return file.read()


if __name__ == "__main__":
    os.umask(0o077)
    sweep(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
