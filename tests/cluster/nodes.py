"""A Ray cluster of several nodes on one machine; each has its own network namespace and address.

So a node can be cut off from the others as well as killed, as machines can. It needs root and `ip`
(Debian: iproute2).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
GCS_PORT, DASHBOARD_PORT, METRICS_PORT = 6399, 8299, 8199
TOKEN = "token-of-this-cluster-never-to-be-seen-0123456789"
UP_WITHIN_S = 90.0
OBJECT_STORE_BYTES = 200 << 20
QUICK_HEALTH = {  # a node that is cut off is given up after some 6 seconds, not after 50
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def missing() -> str | None:
    """Why there can be no such cluster here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` here; `apt-get install iproute2` brings one"
    return None


def until(what: str, true: Callable[[], Any], within_s: float = UP_WITHIN_S) -> Any:
    """Ask until the answer is true, and return it; fails by the name of what was waited for."""
    deadline = time.monotonic() + within_s
    while not (answer := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {within_s:.0f} s still not: {what}")
        time.sleep(0.2)
    return answer


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def subnet() -> str:
    """Of this process's cluster; the machine itself is ``.1`` of it."""
    pid = os.getpid()
    return f"10.{64 + pid % 128}.{pid // 128 % 256}"


@dataclass
class Node:
    """One node: a namespace, an address and the `ray start` that runs there."""

    namespace: str
    address: str
    process: subprocess.Popen[bytes]
    disk: Path

    def program(self, name: str) -> int:
        """The process here that runs this program."""
        for pid in self.pids():
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode()):
                return pid
        raise LookupError(f"no {name} on {self.address}")

    def inside(self, *command: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a program as one of this node: its network, its disk."""
        words = ["nsenter", "--target", str(self.program("raylet")), "--net", "--mount", *command]
        piped = {name: subprocess.PIPE for name in ("stdin", "stdout")}
        return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, **piped)

    def logs(self) -> str:
        """What its raylet wrote."""
        return "".join(log.read_text() for log in self.disk.glob("session_2*/logs/raylet.out"))

    def pids(self) -> list[int]:
        """Of all processes in its namespace."""
        words = ["ip", "netns", "pids", self.namespace]
        return [int(pid) for pid in subprocess.run(words, capture_output=True).stdout.split()]

    def kill(self) -> None:
        """End all of its processes at once, as when a machine disappears."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait()

    def cut(self) -> None:
        """Cut its network in both directions."""
        ip("link", "set", self.namespace, "down")

    def restore(self) -> None:
        ip("link", "set", self.namespace, "up")


@dataclass
class Nodes:
    """The cluster. The machine itself has an address on its bridge, as a client's would be."""

    folder: Path
    bridge: str
    subnet: str
    environment: dict[str, str]
    restartable: bool = False  # its head's GCS keeps its state elsewhere
    nodes: list[Node] = field(default_factory=list)
    _made: int = 0

    @property
    def here(self) -> str:
        """The address by which the nodes reach this machine."""
        return f"{self.subnet}.1"

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        return self.nodes[1:]

    @property
    def address(self) -> str:
        """Of the head's job server, also before there is a head."""
        return f"http://{self.subnet}.11:{DASHBOARD_PORT}"

    def add(
        self, cpus: int = 2, resources: dict[str, float] | None = None, **environment: str
    ) -> Node:
        """Start another node; the first one is the head. Returns when it is up.

        A node ends when a process of Ray on it does, but for a head that is restartable.
        """
        self._made += 1
        name, address = f"{self.bridge}{self._made}", f"{self.subnet}.{10 + self._made}"
        inside = f"{name}i"
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", inside)
        ip("link", "set", inside, "netns", name)
        ip("link", "set", name, "master", self.bridge, "up")
        for words in (
            ("addr", "add", f"{address}/24", "dev", inside),
            ("link", "set", inside, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", name, *words)
        if self.nodes:
            place = ["--address", f"{self.head.address}:{GCS_PORT}"]
        else:
            place = ["--head", "--port", str(GCS_PORT), "--temp-dir", str(self.folder / "ray")]
            place += ["--dashboard-host", address, "--dashboard-port", str(DASHBOARD_PORT)]
            place += ["--metrics-export-port", str(METRICS_PORT)]
        # A disk of its own: all nodes of a cluster use the same path, and clean up below it.
        disk = self.folder / f"disk{self._made}"
        disk.mkdir()
        stays = self.restartable and not self.nodes
        start = '"$@" && exec sleep infinity' if stays else 'exec "$@" --block'
        mounted = f"mount --bind {disk} {self.folder / 'ray'} && {start}"
        command = [
            *("ip", "netns", "exec", name, "sh", "-c", mounted, "sh"),
            *(str(BIN / "ray"), "start", *place),
            *("--node-ip-address", address, "--num-cpus", str(cpus), "--disable-usage-stats"),
            *("--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--resources", json.dumps(resources or {})),
        ]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environment | environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = Node(name, address, process, disk)
        self.nodes.append(node)
        try:
            until(f"node {address} is up", lambda: self._is_up(node))
        except TimeoutError as error:
            asked = self.run("ray", "list", "nodes")
            raise TimeoutError(
                f"{error}\n{self._log(node)}\n{asked.stdout}{asked.stderr}"
            ) from None
        return node

    def metrics(self) -> dict[str, float]:
        """Of the head: name and labels -> value, as Prometheus would read them."""
        place = f"http://{self.head.address}:{METRICS_PORT}/metrics"
        with urllib.request.urlopen(place, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def kill(self, node: Node) -> None:
        node.kill()
        self.nodes.remove(node)

    def states(self) -> dict[str, str]:
        """Address -> state (``ALIVE``, ``DEAD``) of every node, the last of each address."""
        done = self.run("ray", "list", "nodes", "--format", "json", "--limit", "200")
        try:
            listed = json.loads(done.stdout[done.stdout.index("[") :])
        except ValueError:
            return {}
        listed.sort(key=lambda one: one["start_time_ms"] or 0)
        return {one["node_ip"]: one["state"] for one in listed}

    def drain(self, node: Node, seconds: int) -> None:
        """Announce that the node will be removed, as a cloud does for a spot instance."""
        done = self.run("ray", "list", "nodes", "--format", "json", "--limit", "200")
        listed = json.loads(done.stdout[done.stdout.index("[") :])
        (one,) = [it for it in listed if it["node_ip"] == node.address and it["state"] == "ALIVE"]
        words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        deadline = ("--deadline-remaining-seconds", str(seconds))
        place = ("--address", f"{self.head.address}:{GCS_PORT}")
        done = self.run("ray", "drain-node", *place, "--node-id", one["node_id"], *words, *deadline)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(
        self, program: str, *words: str, within_s: float = 300, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command in another shell of this machine, which is no node of the cluster."""
        return subprocess.run(
            [str(BIN / program), *words],
            cwd=self.folder,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=within_s,
        )

    def batchgen(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run("batchgen", *words, **more)

    def _is_up(self, node: Node) -> bool:
        if node.process.poll() is not None:
            raise RuntimeError(f"{node.address} has ended:\n{self._log(node)}")
        return self.states().get(node.address) == "ALIVE"

    def _log(self, node: Node) -> str:
        """The end of what its `ray start` printed."""
        return (self.folder / f"{node.namespace}.log").read_text()[-2000:]

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        for number in range(1, self._made + 1):  # the link first: a namespace may go later
            for kind in ("link", "netns"):
                words = ["ip", kind, "del", f"{self.bridge}{number}"]
                subprocess.run(words, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster(
    workers: int = 2, head_cpus: int = 0, redis: int | None = None, **environment: str
) -> Iterator[Nodes]:
    """A head and some workers of 2 CPUs each; all of it is gone afterwards.

    The head's GCS keeps its state in the ``redis`` at this port of the machine, if one is given.
    """
    folder = Path(tempfile.mkdtemp(prefix="bgc"))  # short: Ray puts sockets below it
    settings = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(folder),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "BATCHGEN_CACHE": str(folder / "cache"),
        **QUICK_HEALTH,
        **({"RAY_REDIS_ADDRESS": f"{subnet()}.1:{redis}"} if redis else {}),
        **environment,
    }
    nodes = Nodes(folder, f"bg{os.getpid()}", subnet(), settings, restartable=redis is not None)
    (folder / "ray").mkdir()
    try:
        ip("link", "add", nodes.bridge, "type", "bridge")
        ip("addr", "add", f"{nodes.here}/24", "dev", nodes.bridge)
        ip("link", "set", nodes.bridge, "up")
        # Said before there is one: Ray would look for any on the machine, and take another test's.
        settings["RAY_API_SERVER_ADDRESS"] = nodes.address
        nodes.add(cpus=head_cpus)
        for _ in range(workers):
            nodes.add()
        yield nodes
    finally:
        nodes.close()


def replicas(node: Node, stage: str = "Generate", at_work: bool = False) -> list[int]:
    """Processes of the stage's actors on this node; Ray names them by what they run."""
    found = []
    for pid in node.pids():
        try:
            title = " ".join(psutil.Process(pid).cmdline())
        except psutil.NoSuchProcess:
            continue
        wanted = title.startswith("ray::") and stage in title
        if wanted and (".submit" in title or not at_work):
            found.append(pid)
    return found


def busy_worker(nodes: Nodes) -> Node:
    """A node beside the head that has a replica with a shard in work."""
    found: list[Node] = []

    def look() -> bool:
        found[:] = [node for node in nodes.workers if replicas(node, at_work=True)]
        return bool(found)

    until("a worker node has a replica at work", look)
    return found[0]
