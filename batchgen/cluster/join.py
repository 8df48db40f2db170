"""Joins a Ray cluster, or starts Ray on this machine and stops it at the end."""

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
LOOK_WITHIN_S = 60.0  # a node that has just joined may take long to start its first worker


@contextmanager
def cluster(address: str | None) -> Iterator[bool]:
    """Join the cluster at ``address``, or start Ray on this machine and stop it at the end.

    Yields whether a cluster was joined: only then may nodes be added to it.
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
        put_back()  # ray.init replaces the handlers
        yield
    finally:
        ray.shutdown()
        put_back()  # after a shutdown SIGTERM would kill this process without a message


def refuse_unshared(paths: Sequence[str]) -> None:
    """On a cluster of several nodes, check that these local paths exist on every node.

    Raises:
        UsageError: names the nodes where they do not exist, and the first path.
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
            f"{next(iter(blind.values()))[0]} does not exist on {len(blind)} of {len(nodes)} nodes "
            f"({', '.join(sorted(blind)[:5])}); use an object store (s3://, gs://, az://) or a "
            "folder that all nodes share"
        )


def this_node() -> str:
    """The id of the node that this process runs on; empty without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def this_actor() -> str:
    """The id of this process's actor, which a restart keeps; empty if it is not an actor."""
    return str(ray.get_runtime_context().get_actor_id() or "") if ray.is_initialized() else ""


def living_nodes() -> frozenset[str]:
    """Ids of the nodes that are alive and not about to be removed."""
    if not ray.is_initialized():
        return frozenset([this_node()])
    return frozenset(node["NodeID"] for node in _staying())


def nodes_that_stay() -> list[dict[str, float]]:
    """Resource -> total amount, for each node that is alive and not about to be removed."""
    return [dict(node["Resources"]) for node in _staying()]


def _staying() -> list[dict[str, Any]]:
    """The nodes that are alive and not draining. (A draining node is about to be removed.)"""
    draining = ray._private.state.state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _init(address: str, options: dict[str, Any]) -> None:
    try:
        with _silenced_native_stderr():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises a plain Exception if the machine is too busy
        if address == "local":
            raise UsageError(f"Ray cannot be started on this machine: {error}") from error
        raise UsageError(f"cannot reach the Ray cluster at {address}: {error}") from error


@contextmanager
def _silenced_native_stderr() -> Iterator[None]:
    """Discard what native code writes to stderr; failures also arrive as exceptions."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_ray() -> None:
    """Turn off Ray's progress bars and log lines on the terminal, which would bury ours.

    The log lines are still written to Ray's session folder.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # When a stream fails, Ray Data's usage statistics ask the head, and without one wait forever.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
