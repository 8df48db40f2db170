"""Joins a Ray cluster, or starts Ray on this machine and ends it again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchgen.cluster.addresses import check_head, joined
from batchgen.cluster.ray_token import close_token
from batchgen.cluster.session import private_session
from batchgen.errors import UsageError

LOCAL = {"include_dashboard": False, "object_store_memory": 2 << 30}
LOOK_WITHIN_S = 60.0  # a node that joins in this moment may take long to start its first worker


@contextmanager
def cluster(address: str | None) -> Iterator[bool]:
    """Join the cluster at ``address`` or start Ray on this machine; what was started is ended.

    Yields whether it was joined, so that it may grow.
    """
    _quiet_ray()
    close_token()
    if ray.is_initialized():
        yield False
    elif wanted := joined(address):
        check_head(wanted, "--address" if address else "RAY_ADDRESS")
        with _connected(wanted, {}):
            yield True
    else:
        with private_session() as folder, _connected("local", {**LOCAL, "_temp_dir": folder}):
            yield False


@contextmanager
def _connected(address: str, options: dict[str, Any]) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    try:
        _init(address, options)
        put_back()  # ray.init puts its own in their place
        yield
    finally:
        ray.shutdown()
        put_back()  # and after it SIGTERM would kill this process without a word


def refuse_unshared(paths: Sequence[str]) -> None:
    """On a cluster of several nodes, see that every one of them sees these local paths.

    Raises:
        UsageError: names the nodes that do not, and the first path.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or not paths:
        return

    def unseen(wanted: Sequence[str]) -> list[str]:
        return [path for path in wanted if not os.path.exists(path)]

    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(unseen).options(num_cpus=0, scheduling_strategy=there)
        asked[task.remote(list(paths))] = node["NodeManagerAddress"]
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_WITHIN_S)
    blind = {asked[answer]: lost for answer in answered if (lost := ray.get(answer))}
    if blind:
        raise UsageError(
            f"{next(iter(blind.values()))[0]} is a folder that {len(blind)} of {len(nodes)} nodes "
            f"do not see ({', '.join(sorted(blind)[:5])}): use a store (s3://, gs://, az://) or a "
            "folder that all nodes share"
        )


def this_node() -> str:
    """The id of the node that this process runs on; empty without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def this_actor() -> str:
    """The id of the actor that this process is, the same when Ray starts it again; else empty."""
    return str(ray.get_runtime_context().get_actor_id() or "") if ray.is_initialized() else ""


def living_nodes() -> frozenset[str]:
    """Ids of the nodes that are there and are to stay."""
    if not ray.is_initialized():
        return frozenset([this_node()])
    return frozenset(node["NodeID"] for node in _staying())


def nodes_that_stay() -> list[dict[str, float]]:
    """Resource -> amount in all, of each of these nodes."""
    return [dict(node["Resources"]) for node in _staying()]


def _staying() -> list[dict[str, Any]]:
    """The nodes that live and are not draining: those are about to be taken away."""
    draining = ray._private.state.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _init(address: str, options: dict[str, Any]) -> None:
    try:
        with _silenced_native_stderr():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # of no kind of its own where a machine is too busy to start Ray
        if address == "local":
            raise UsageError(f"Ray cannot be started on this machine: {error}") from error
        raise UsageError(f"cannot reach the Ray cluster at {address}: {error}") from error


@contextmanager
def _silenced_native_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr meanwhile; failures come as exceptions."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_ray() -> None:
    """Keep Ray's own bars and log lines from burying ours; they stay in its session folder."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray Data's statistics of use ask the head when a stream fails: without one they wait for ever.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
