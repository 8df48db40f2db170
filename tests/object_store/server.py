"""Runs Ceph's S3 gateway as child processes in one folder: a real server with real signatures.

python -m tests.object_store.server --folder out/s3 --background   prints the exports for clients
python -m tests.object_store.server --folder out/s3 --stop
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import psutil

PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd")
KEY, SECRET = "testkey", "testsecret-of-the-first-user"
OTHER_KEY, OTHER_SECRET = "otherkey", "othersecret-of-the-second-user"
STARTS_WITHIN_S = 60.0
MEMORY_BYTES = 4 << 30


def missing() -> list[str]:
    """Programs that are not installed; Debian's packages have the same names."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_port() -> int:
    """A port that nothing uses, below those that the kernel gives away meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


@dataclass
class S3Server:
    """A monitor, an object store in memory and a gateway. ``start`` begins with nothing stored."""

    folder: Path
    address: str = "127.0.0.1"  # by which clients reach it; another one opens it to all networks
    memory_bytes: int = MEMORY_BYTES
    port: int = field(default_factory=free_port)
    pids: dict[str, int] = field(default_factory=dict)
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def exports(self) -> dict[str, str]:
        """Environment variables with which clients reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Raises RuntimeError with the end of its log if it does not answer."""
        for name in ("mon", "osd", "rgw", "log"):
            (self.folder / name).mkdir(parents=True)
        mon_port, fsid = free_port(), str(uuid.uuid4())
        values = {
            "folder": str(self.folder),
            "bind": "127.0.0.1" if self.address == "127.0.0.1" else "0.0.0.0",
            "port": self.port,
            "mon_port": mon_port,
            "fsid": fsid,
            "memory_bytes": self.memory_bytes,
        }
        template = Template((Path(__file__).parent / "ceph.conf.in").read_text())
        self.conf.write_text(template.substitute(values))
        monmap = str(self.folder / "monmap")
        address = f"[v2:127.0.0.1:{mon_port}]"
        _call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._spawn("mon", "ceph-mon", "-f", "-i", "a")
        osd_id = str(uuid.uuid4())
        self._call("ceph", "--connect-timeout", "30", "osd", "new", osd_id)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._spawn("osd", "ceph-osd", "-f", "-i", "0")
        for user, key, secret in (("test", KEY, SECRET), ("other", OTHER_KEY, OTHER_SECRET)):
            words = ("user", "create", f"--uid={user}", f"--display-name={user}")
            self._call("radosgw-admin", *words, f"--access-key={key}", f"--secret-key={secret}")
        self.start_gateway()

    def start_gateway(self) -> None:
        self._spawn("rgw", "radosgw", "-f", "-n", "client.rgw")
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline and self._children["rgw"].poll() is None:
            if _listens(self.pids["rgw"], self.port):
                return
            time.sleep(0.05)
        raise RuntimeError(f"the S3 gateway does not answer:\n{self._log('rgw')}")

    def kill_gateway(self) -> None:
        """As a crash would: nothing is closed. What is stored stays."""
        self._end("rgw", signal.SIGKILL)

    def stop(self) -> None:
        for name in ("rgw", "osd", "mon"):
            self._end(name, signal.SIGKILL)  # it holds nothing that is wanted again

    @property
    def conf(self) -> Path:
        return self.folder / "ceph.conf"

    def _spawn(self, name: str, *words: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._children[name] = subprocess.Popen(
                [*words, "-c", str(self.conf)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pids[name] = self._children[name].pid

    def _end(self, name: str, number: signal.Signals) -> None:
        child = self._children.pop(name, None)
        self.pids.pop(name, None)
        if child is not None:
            child.send_signal(number)
            child.wait(30)

    def _call(self, *words: str) -> None:
        _call(*words, "-c", str(self.conf))

    def _log(self, name: str) -> str:
        text = (self.folder / "log" / f"{name}.out").read_text(errors="replace")
        return "\n".join(text.splitlines()[-20:])


def _listens(pid: int, port: int) -> bool:
    """It, and not another program that came to the port first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid).net_connections("tcp")
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)
    return False


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")


def make_bucket(server: S3Server, name: str) -> None:
    import s3fs

    options = {"key": KEY, "secret": SECRET, "endpoint_url": server.endpoint}
    s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir(name)


def _stop(folder: Path) -> int:
    """End the processes that a start in the background has left, by their ids."""
    for pid in json.loads((folder / "pids.json").read_text()).values():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bucket", default="batchgen")
    parser.add_argument("--background", action="store_true")
    parser.add_argument("--stop", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.stop:
        return _stop(folder)
    if missing():
        print(f"install first: apt-get install {' '.join(PROGRAMS)}", file=sys.stderr)
        return 1
    server = S3Server(folder)
    server.start()
    make_bucket(server, options.bucket)
    (folder / "pids.json").write_text(json.dumps(server.pids))
    for name, value in server.exports.items():
        print(f"export {name}={value}", flush=True)
    if not options.background:
        try:
            signal.pause()
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
