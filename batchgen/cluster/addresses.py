"""Checks the two addresses of a Ray cluster: its head, which a run joins, and its job server."""

from __future__ import annotations

import os
import re
import socket

from batchgen.errors import UsageError

WITHIN_S = 2.0
GREETS_WITHIN_S = 10.0
HEAD_PORT, JOB_PORT = 6379, 8265
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")
JOIN = (
    f"`batchgen run --address HOST:{HEAD_PORT}` joins a cluster from a machine that is part of it"
)
SUBMIT = f"`batchgen submit --address http://HOST:{JOB_PORT}` submits a job from any machine"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FRAME, SETTINGS = 9, 4  # header length and type of the first frame that a gRPC server sends
REACH = (
    "is it the address of the head's dashboard (port 8265), and can it be reached from here? "
    "`ray dashboard CLUSTER.yaml` or `kubectl port-forward` forwards the port"
)


def joined(given: str | None) -> str | None:
    """The address of the cluster that a run joins; None if it starts its own Ray.

    ``given`` has precedence over RAY_ADDRESS; ``local`` means to start Ray here.
    """
    found = given or os.environ.get("RAY_ADDRESS")
    return None if found == "local" else found


def check_head(address: str, source: str = "--address") -> None:
    """Check within seconds that a Ray head answers at HOST:PORT; ``auto`` is left to Ray.

    Raises:
        UsageError: the address is not valid, nothing answers, or another kind of server does.
    """
    what = f"{source} {address}"
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise UsageError(f"{what} is the address of a job server: {SUBMIT}; {JOIN}")
    if address.startswith("ray://"):
        raise UsageError(f"{what}: the Ray client (ray://) is not supported; {SUBMIT}; {JOIN}")
    host, port = _parsed(address, what, f"HOST:{HEAD_PORT}, the head's address, or auto")
    with _opened(host, port, f"{what}: no Ray head answers there", "is the cluster up?") as head:
        if os.environ.get("RAY_USE_TLS") == "1":
            return
        answer = _greeting(head)
    if answer.startswith(b"HTTP/"):
        raise UsageError(f"{what}: a web server answers there, perhaps Ray's job server: {SUBMIT}")
    if len(answer) < FRAME or answer[3] != SETTINGS:
        raise UsageError(f"{what}: the server there is not a Ray head; {JOIN}")


def check_job_server(url: str) -> None:
    """Check within seconds that a server answers at ``http://HOST:PORT``.

    Raises:
        UsageError: the address is not valid, or nothing answers.
    """
    scheme, _, rest = url.partition("://")
    address = rest.partition("/")[0].rpartition("@")[2]
    if scheme == "ray" or address.endswith(f":{HEAD_PORT}"):
        raise UsageError(f"--address {url} is the address of the Ray head: {SUBMIT}; {JOIN}")
    if scheme not in ("http", "https"):
        raise UsageError(f"--address {url} is not a URL; allowed: http://HOST:{JOB_PORT}")
    if not ADDRESS.fullmatch(address):
        address += ":443" if scheme == "https" else ":80"
    host, port = _parsed(address, f"--address {url}", f"http://HOST:{JOB_PORT}")
    _opened(host, port, no_job_server(url), REACH).close()


def no_job_server(url: str) -> str:
    return f"no Ray job server answers at {url}"


def _parsed(address: str, what: str, allowed: str) -> tuple[str, int]:
    found = ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise UsageError(f"{what} is not a valid address; allowed: {allowed}")
    return found[1].strip("[]"), int(found[2])


def _opened(host: str, port: int, what: str, remedy: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), WITHIN_S)
    except socket.gaierror as error:
        why = f"there is no host {host} ({error.strerror})"
    except TimeoutError:
        why = f"{host} did not answer within {WITHIN_S:g} s"
    except OSError as error:
        why = str(error.strerror).lower()
    raise UsageError(f"{what}: {why}; {remedy}")


def _greeting(head: socket.socket) -> bytes:
    """The first bytes that the server sends to a gRPC client; may be empty."""
    said = b""
    try:
        head.settimeout(GREETS_WITHIN_S)
        head.sendall(PREFACE)
        while len(said) < FRAME and (more := head.recv(64)):
            said += more
    except OSError:
        pass
    return said
