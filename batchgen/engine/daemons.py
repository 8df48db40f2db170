"""Ends a run with words when a process of Ray is lost that Ray ends its driver for, wordless."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from batchgen.engine.cluster import this_node

LOOK_EVERY_S = 1.0
ANSWERS_WITHIN_S = 5.0
HEAD_GONE_FOR_S = 45.0  # Ray waits 60 s for a head that is started again, then ends this process

Address = tuple[str, int]


@contextmanager
def guarded(interrupt: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``interrupt`` is called once if the raylet here or the cluster's head is lost."""
    over = threading.Event()
    raylet, head = _raylet(), _head()

    def look() -> None:
        answered = time.monotonic()
        while not over.wait(LOOK_EVERY_S):
            if _refuses(raylet):
                interrupt("Ray's process of this machine, the raylet, has ended")
                return
            if _answers(head):
                answered = time.monotonic()
            elif time.monotonic() - answered > HEAD_GONE_FOR_S:
                at = f"{head[0]}:{head[1]}"
                interrupt(f"Ray's head at {at} has not answered for {HEAD_GONE_FOR_S:g} s")
                return

    thread = threading.Thread(target=look, name="daemons", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _raylet() -> Address:
    (node,) = (one for one in ray.nodes() if one["NodeID"] == this_node())
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _head() -> Address:
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address, ANSWERS_WITHIN_S).close()
    except OSError:
        return False
    return True


def _refuses(address: Address) -> bool:
    """Nobody listens there; a machine that is too busy to answer is another matter."""
    try:
        socket.create_connection(address, ANSWERS_WITHIN_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
