"""Runs `ray up` on ray-cluster.yaml for real: Ray's launcher against sshd on this machine.

Only the cloud is replaced by Ray's provider for machines that are there, and paths and ports by
ones that are free; the commands, the copied files and the token are those of the file. The head and
a worker are an sshd each, at an address of its own, in namespaces of their own: of processes, so
that `ray stop`, which is one of the commands, sees no other Ray, and all ends with sshd; and of
mounts, so that each has its own disk at the same paths. It needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.object_store.server import free_port

ROOT = Path(__file__).parents[2]
PROGRAMS = {"sshd": "openssh-server", "ssh-keygen": "openssh-client", "rsync": "rsync"}
BIN = Path(sys.executable).parent
UP_WITHIN_S = 30.0
HEAD, WORKER, NONE = "127.0.0.1", "127.0.0.2", "127.0.0.3"


def missing() -> str | None:
    """Why there can be no such launch here, or None."""
    absent = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if absent:
        return f"`apt-get install {' '.join(absent)}` brings what is missing"
    return None if os.geteuid() == 0 else "process namespaces need root"


@dataclass
class Machine:
    """What takes the place of a cloud: a folder with a disk for each machine, and sshd on each."""

    home: Path
    environment: dict[str, str]

    @property
    def file(self) -> Path:
        return self.home / "ray-cluster.yaml"

    def disk(self, address: str) -> Path:
        """What the machine at this address has where the file says /home/ubuntu."""
        return self.home / address

    def run(self, *words: str, within_s: float = 300) -> subprocess.CompletedProcess[str]:
        """A command of the person at the launcher."""
        return subprocess.run(
            words,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
        )


def derived(home: Path, dashboard: int) -> dict[str, Any]:
    """ray-cluster.yaml for this one machine."""
    text = (ROOT / "ray-cluster.yaml").read_text().replace("/home/ubuntu", str(home / "node"))
    gcs = free_port()
    text = text.replace("6379", str(gcs))
    ports = f"--dashboard-port={dashboard} --dashboard-agent-listen-port={free_port()}"
    own = f"--temp-dir={home / 'r'} --num-cpus=2 {ports}"
    text = text.replace("ray start --head", f"ray start --head {own}")
    worker = f"--num-cpus=2 --dashboard-agent-listen-port={free_port()}"
    text = text.replace("ray start --address", f"ray start {worker} --address")
    tree: dict[str, Any] = yaml.safe_load(text)
    for cloud in ("available_node_types", "head_node_type", "max_workers"):
        del tree[cloud]
    # All of these are to be there; with this provider Ray counts the head as one of them.
    tree["provider"] = {"type": "local", "head_ip": HEAD, "worker_ips": [WORKER, NONE]}
    tree["auth"] = {"ssh_user": "root", "ssh_private_key": str(home / "key")}
    return tree


@contextmanager
def machine() -> Iterator[Machine]:
    home = Path(tempfile.mkdtemp(prefix="bgl"))
    for folder in ("bin", "node", "r"):
        (home / folder).mkdir()
    port, dashboard = free_port(), free_port()
    key = home / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    write_ssh(home / "bin", port)
    environment_like_the_files(home / "node" / "env")
    # The head's way to the worker; ssh itself looks for ~ in the list of users, not in HOME.
    write_ssh(home / "node" / "env" / "bin", port, home / "node" / "ray_bootstrap_key.pem")
    for address in (HEAD, WORKER):
        shutil.copytree(home / "node", home / address, symlinks=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(home),
        "TMPDIR": str(home),  # of the launcher's own notes
        "PATH": f"{home / 'bin'}:{BIN}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "token",
        "BATCHGEN_CACHE": str(home / "cache"),
    }
    one = Machine(home, environment)
    one.file.write_text(yaml.safe_dump(derived(home, dashboard)))
    key_of_hosts = home / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key_of_hosts], check=True)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for address in (HEAD, WORKER):
            daemons.append(start_sshd(home, address, port))
        yield one
    finally:
        for daemon in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)  # its namespace's first process: all end
            daemon.wait()
        shutil.rmtree(home, ignore_errors=True)


def write_ssh(folder: Path, port: int, *keys: Path) -> None:
    """An ssh for this port, which the launcher has no option for, and with these keys."""
    words = " ".join([str(shutil.which("ssh")), "-p", str(port), *(f"-i {key}" for key in keys)])
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (folder / "ssh").chmod(0o755)


def environment_like_the_files(folder: Path) -> None:
    """What the file's first command would make, with this environment's packages in it already."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/*/site-packages")
    (ours,) = BIN.parent.glob("lib/*/site-packages")
    (site / "packages.pth").write_text(f"{ours}\n")
    script = (BIN / "ray").read_text().split("\n", 1)[1]
    (folder / "bin" / "ray").write_text(f"#!{folder / 'bin' / 'python'}\n{script}")
    (folder / "bin" / "ray").chmod(0o755)


def start_sshd(home: Path, address: str, port: int) -> subprocess.Popen[bytes]:
    """With this address's folder as its disk; returns when it answers."""
    settings = {
        "Port": port,
        "ListenAddress": address,
        "HostKey": home / "host_key",
        "AuthorizedKeysFile": home / "key.pub",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "none",
        # TMPDIR is the launcher's: there this provider lists what runs, and only `ray up` adds the
        # head to the list.
        "SetEnv": f"HOME={home / 'node'} TMPDIR={home}",
    }
    lines = [f"{name} {value}" for name, value in settings.items()]
    (home / address / "sshd_config").write_text("\n".join(lines) + "\n")
    (home / address / "r").mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = [str(shutil.which("sshd")), "-D", "-e", "-f", str(home / "node" / "sshd_config")]
    disk = f"mount --bind {home / address} {home / 'node'}"
    temporary = f"mount --bind {home / 'node' / 'r'} {home / 'r'}"
    own = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-ec"]
    log_file = home / f"sshd-{address}.log"
    with log_file.open("wb") as log:
        daemon = subprocess.Popen(
            [*own, f'{disk}; {temporary}; exec "$@"', "sh", *sshd],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline and daemon.poll() is None:
        with socket.socket() as one:
            if one.connect_ex((address, port)) == 0:
                return daemon
        time.sleep(0.05)
    raise RuntimeError(f"sshd does not answer:\n{log_file.read_text()}")
