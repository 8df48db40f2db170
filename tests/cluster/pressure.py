"""Memory, object stores or the head's GCS run out or are killed while a job runs on them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.cluster.nodes import BIN, OBJECT_STORE_BYTES, Node, Nodes, replicas, until
from tests.object_store.server import free_port

EATEN_BYTES = 5 << 30
SPARE_BYTES = 3 << 30  # what the job itself may take beside it
BLOCK_BYTES = 10 << 20
EAT = "import sys; kept = bytearray(int(sys.argv[1])); print('eaten', flush=True); sys.stdin.read()"
FILL = """
import sys
import numpy, ray
ray.init(address="auto", _node_ip_address=sys.argv[1], log_to_driver=False)
kept = [ray.put(numpy.ones(int(sys.argv[3]), numpy.uint8)) for _ in range(int(sys.argv[2]))]
held = ray.get(kept[-len(kept) // 3:])  # mapped into this process: these cannot be spilled
print("filled", flush=True)
sys.stdin.read()
"""


def add_watchful(nodes: Nodes) -> None:
    """A node for the job's replicas whose Ray ends workers soon after other programs take much."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + SPARE_BYTES) / memory.total
    nodes.add(
        resources={"watchful": 2.0},
        RAY_memory_usage_threshold=f"{limit:.3f}",
        RAY_memory_monitor_refresh_ms="200",
    )


def eat_memory(nodes: Nodes) -> None:
    """Another program on the node takes it until Ray has ended a replica."""
    node = nodes.workers[-1]
    before = set(until("it has a replica at work", lambda: replicas(node, at_work=True)))
    program = beside(nodes, node, EAT, EATEN_BYTES)
    until("Ray ends workers for it", lambda: "OOM kill reason" in node.logs())
    until("a replica was ended", lambda: before - set(replicas(node)))
    program.kill()
    program.wait()


def fill_object_stores(nodes: Nodes) -> None:
    """On every worker another program holds more objects than fit, until the end of the job."""
    for node in nodes.workers:
        blocks = OBJECT_STORE_BYTES // BLOCK_BYTES * 3 // 2
        beside(nodes, node, FILL, node.address, blocks, BLOCK_BYTES)
    until("objects were spilled", lambda: all(":Spilled " in one.logs() for one in nodes.workers))


def beside(nodes: Nodes, node: Node, program: str, *words: object) -> subprocess.Popen[bytes]:
    """Start another Python program on the node; returns when it has said its line."""
    command = (str(BIN / "python"), "-c", program, *map(str, words))
    process = node.inside(*command, environment=nodes.environment)
    assert process.stdout is not None
    assert process.stdout.readline(), f"the program beside ended with {process.wait()}"
    return process


@contextmanager
def redis() -> Iterator[int]:
    """The port of a Redis that keeps its state in memory."""
    port = free_port()
    words = ("--port", str(port), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "")
    process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def restart_gcs(nodes: Nodes) -> None:
    """The GCS is killed and restarted unchanged, while the job's processes continue."""
    pid = nodes.head.program("gcs_server")
    command = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    lines = Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")
    os.kill(pid, signal.SIGKILL)
    until("it is gone", lambda: pid not in nodes.head.pids())
    nodes.head.inside(*command, environment=dict(line.split("=", 1) for line in lines))
    until("the cluster answers", lambda: set(nodes.states().values()) == {"ALIVE"})
