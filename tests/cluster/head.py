"""`ray start --head` and `ray stop` as the docs show them, without touching any other Ray here.

Ray's own `ray stop` ends every Ray of the machine. A `ray` of this module, put first on the PATH,
starts a head at ports of its own and ends that one alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.object_store.server import free_port

ROOT = Path(__file__).parents[2]
UP_WITHIN_S = 90.0


def install(folder: Path) -> dict[str, str]:
    """Put the command into ``folder``/bin; returns the environment for those who use it."""
    (folder / "bin").mkdir(parents=True)
    command = folder / "bin" / "ray"
    words = f'"{sys.executable}" -m tests.cluster.head "{folder}"'
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec {words} "$@"\n')
    command.chmod(0o755)
    ports = {"gcs": free_port(), "dashboard": free_port()}
    (folder / "ports.json").write_text(json.dumps(ports))
    address = f"http://127.0.0.1:{ports['dashboard']}"
    return {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": address,
    }


def start(folder: Path) -> None:
    stop(folder)  # of a block that failed before its own stop
    ports = json.loads((folder / "ports.json").read_text())
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
        *("--port", str(ports["gcs"]), "--dashboard-port", str(ports["dashboard"])),
        *("--dashboard-host", "127.0.0.1", "--temp-dir", str(folder / "ray"), "--num-cpus", "2"),
        *("--object-store-memory", str(512 << 20), "--disable-usage-stats"),
        *("--dashboard-agent-listen-port", str(free_port())),  # every Ray of a machine has one
    ]
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (folder / "pid").write_text(str(head.pid))
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline and head.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{ports['dashboard']}/api/version", timeout=5)
            return
        except urllib.error.HTTPError:  # it answers, to those who have its token
            return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the head does not come up:\n{(folder / 'log').read_text()[-2000:]}")


def stop(folder: Path) -> None:
    """Whatever was started here, and its children."""
    pid = folder / "pid"
    if not pid.exists():
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(int(pid.read_text()))
        for process in [head, *head.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    pid.unlink()
    shutil.rmtree(folder / "ray", ignore_errors=True)


def main() -> int:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    if words == ["start", "--head"]:
        start(folder)
    elif words == ["stop"]:
        stop(folder)
    else:
        os.execv(str(Path(sys.executable).parent / "ray"), ["ray", *words])
    return 0


if __name__ == "__main__":
    sys.exit(main())
