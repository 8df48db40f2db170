"""A wrong address is reported within seconds, with the command that needs such an address."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from batchgen.cli import main
from batchgen.cluster import addresses
from batchgen.cluster.addresses import check_head, check_job_server, joined
from batchgen.cluster.submit import Cluster
from batchgen.errors import UsageError
from tests.datasets_on_disk import write_prompts
from tests.fuzzing import fuzz
from tests.object_store.server import free_port


@contextmanager
def listening(greeting: bytes | None) -> Iterator[str]:
    """A server that sends ``greeting`` to every client and closes; with None it sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                if greeting is not None:
                    client.sendall(greeting)
                    client.close()
                else:
                    clients.append(client)

        clients: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for client in clients:
            client.close()


def closed() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "http://head:8265",
            "address of a job server: `batchgen submit --address http://HOST:8265`",
        ),
        ("https://head", "`batchgen run --address HOST:6379` joins a cluster"),
        ("ray://head:10001", "the Ray client (ray://) is not supported"),
        ("head", "allowed: HOST:6379"),
        ("head:port", "allowed: HOST:6379"),
        ("head:99999", "allowed: HOST:6379"),
        ("::1:6379", "allowed: HOST:6379"),
        ("nowhere.invalid:6379", "there is no host nowhere.invalid"),
    ],
)
def test_what_is_no_heads_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"^--address ") as refused:
        check_head(address)
    assert said in str(refused.value)


@fuzz()
@given(st.text(st.characters(codec="utf-8") | st.sampled_from(":/[]@%.0123456789"), max_size=30))
def test_any_text_is_an_address_or_is_refused(text: str) -> None:
    """No connection is made, because no host exists."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(addresses, "_opened", lambda host, port, *words: refuse(host, port))
        for check in (check_head, check_job_server):
            if text != "auto":
                with pytest.raises(UsageError):
                    check(text)


def refuse(host: str, port: int) -> None:
    assert host and 0 < port < 1 << 16
    raise UsageError("nobody listens")


def test_a_closed_port_is_refused_at_once() -> None:
    began = time.monotonic()
    for address in (closed(), f"[::1]:{free_port()}"):
        with pytest.raises(UsageError, match=r"no Ray head answers there: .*is the cluster up"):
            check_head(address)
    assert time.monotonic() - began < addresses.WITHIN_S


@pytest.mark.parametrize(
    ("greeting", "said"),
    [
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", "web server answers there.*batchgen submit"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not a Ray head; `batchgen run"),
        (b"", "not a Ray head"),
        (None, "not a Ray head"),
    ],
)
def test_what_listens_and_is_no_head_is_refused(
    monkeypatch: pytest.MonkeyPatch, greeting: bytes | None, said: str
) -> None:
    monkeypatch.setattr(addresses, "GREETS_WITHIN_S", 0.3)
    with listening(greeting) as address, pytest.raises(UsageError, match=said):
        check_head(address)


@pytest.mark.usefixtures("ray_session")
def test_a_head_is_known_by_its_greeting() -> None:
    check_head(ray.get_runtime_context().gcs_address)


def test_ray_address_counts_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert joined(None) == "elsewhere:6379"
    assert joined("here:6379") == "here:6379"
    assert joined("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert joined(None) is None


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_a_run_is_refused_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_prompts(tmp_path / "in.parquet", 4), tmp_path / "out"
    words = ("run", "--input", str(source), "--output", str(output))
    for address in (closed(), "http://127.0.0.1:8265"):
        result = invoke(*words, "--address", address)
        assert result.exit_code == 1 and address in result.output, result.output
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "batchgen: RAY_ADDRESS http://" in invoke(*words).output
    assert not output.exists()


@pytest.mark.parametrize("address", ["head:6379", "http://head:6379", "ray://head:10001"])
def test_the_heads_own_address_is_no_job_servers(address: str) -> None:
    with pytest.raises(UsageError, match="`batchgen submit --address http://HOST:8265`"):
        Cluster(address)


def test_a_job_server_that_is_not_there_is_told_at_once() -> None:
    began = time.monotonic()
    for address, why in ((closed(), "refused"), ("http://nowhere.invalid:8265", "no host")):
        with pytest.raises(UsageError, match=f"no Ray job server answers at http://.*{why}"):
            Cluster(address)
    assert time.monotonic() - began < 10
    with listening(b"") as address:
        check_job_server(f"http://{address}/")
