"""Interrupts the run with a message when the local raylet or the head dies.

Ray by itself would end the driver without a message.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from batchgen.cluster.join import this_node
from batchgen.watchdog import watchdog

LOOK_EVERY_S = 1.0
ANSWERS_WITHIN_S = 5.0
HEAD_GONE_FOR_S = 40.0  # Ray kills this process after 60 s; an orderly end takes 10 s or more

Address = tuple[str, int]


@contextmanager
def guarded(interrupt: Callable[[str], None]) -> Iterator[None]:
    """Inside, ``interrupt`` is called once if this machine's raylet or the cluster's head dies."""
    raylet, head = _raylet(), _head()
    seen = {one for one in (raylet, head) if _answers(one)}  # watch only what is reachable at all
    answered = time.monotonic()

    def look() -> bool:
        nonlocal answered
        if raylet in seen and _answers(raylet) is False:
            interrupt("Ray's process on this machine, the raylet, has ended")
            return True
        if head not in seen or _answers(head):
            answered = time.monotonic()
        elif time.monotonic() - answered > HEAD_GONE_FOR_S:
            at = f"{head[0]}:{head[1]}"
            interrupt(f"Ray's head at {at} has not answered for {HEAD_GONE_FOR_S:g} s")
            return True
        return False

    with watchdog("daemons", look, LOOK_EVERY_S):
        yield


def _raylet() -> Address:
    (node,) = (one for one in ray.nodes() if one["NodeID"] == this_node())
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _head() -> Address:
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def _answers(address: Address) -> bool | None:
    """Whether a process listens there; None without any answer, for example of a busy machine."""
    try:
        socket.create_connection(address, ANSWERS_WITHIN_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True
