"""Storage options: where they come from, and that no secret is saved or shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.config
import pytest
from fsspec import filesystem as fsspec_filesystem

from batchgen.errors import InputError, SpecError, StorageFailed
from batchgen.secrets import redact
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import Limits, configure, open_store
from batchgen.storage.faults import persist

MINIMAL: dict[str, Any] = {"input": {"path": "in"}, "output": {"url": "out"}}
SECRET = "n0t-for-anyone-to-see"


@pytest.fixture(autouse=True)
def _configured_as_before() -> Iterator[None]:
    yield
    configure()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"s3": {"secret": SECRET}}, "storage_options.s3.secret"),
        ({"s3": {"key": SECRET}}, "storage_options.s3.key"),
        ({"s3": {"token": SECRET}}, "storage_options.s3.token"),
        (
            {"s3": {"client_kwargs": {"aws_secret_access_key": SECRET}}},
            "storage_options.s3.client_kwargs.aws_secret_access_key",
        ),
        ({"az": {"account_key": SECRET}}, "storage_options.az.account_key"),
        ({"az": {"connection_string": SECRET}}, "storage_options.az.connection_string"),
        ({"gs": {"token": {"private_key_id": SECRET}}}, "storage_options.gs"),
        ({"hf": {"token": SECRET + "${NAME}"}}, "storage_options.hf.token"),
        ({"s3": SECRET}, "storage_options.s3"),
        (SECRET, "storage_options"),
        ([SECRET], "storage_options"),
    ],
)
def test_a_secret_may_only_be_named(options: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, {"storage_options": options}))
    assert caught.value.field.startswith(field)
    assert SECRET not in str(caught.value)


def test_a_reference_is_kept_as_it_is_and_followed_only_to_reach_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SECRET", SECRET)
    options = {"s3": {"secret": "${MY_SECRET}", "key": "${MY_SECRET}", "anon": False}}
    spec = build(merge(MINIMAL, {"storage_options": options}))
    assert SECRET not in spec.to_yaml() and "${MY_SECRET}" in spec.to_yaml()
    configure(spec.storage_options, spec.storage.limits())
    assert fsspec.config.conf["s3"]["secret"] == SECRET
    assert redact(f"bad secret {SECRET}") == "bad secret [secret]"


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(SpecError, match=r"storage_options\.s3\.secret: got '\$\{NOT_THERE\}'"):
        configure({"s3": {"secret": "${NOT_THERE}"}})


def test_secrets_of_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert SECRET not in redact(f"cannot sign with {SECRET}")


def test_options_and_limits_reach_the_client() -> None:
    configure(
        {"s3": {"endpoint_url": "http://127.0.0.1:1", "key": None, "anon": True}},
        Limits(connect_timeout_s=1, read_timeout_s=2, connections=3),
    )
    store = open_store("s3://bucket/folder")
    assert store.fs.endpoint_url == "http://127.0.0.1:1" and store.fs.anon
    config = store.fs.config_kwargs
    assert (config["connect_timeout"], config["read_timeout"]) == (1, 2)
    assert config["max_pool_connections"] == 3
    assert store.fs.retries == 1 and config["retries"]["total_max_attempts"] == 1


def test_what_the_environment_says_to_fsspec_still_counts() -> None:
    configure({"memory": {}})
    assert fsspec_filesystem("memory").protocol == "memory"
    configure({"s3": {"config_kwargs": {"signature_version": "s3v4"}}})
    config = open_store("s3://bucket").fs.config_kwargs
    assert config["signature_version"] == "s3v4" and config["connect_timeout"] == 5.0


@pytest.mark.parametrize(("url", "extra"), [("gs://b/x", "gs"), ("az://b/x", "az")])
def test_a_missing_package_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(InputError, match=rf"pip install 'batchgen\[{extra}\]'"):
        open_store(url)


def test_what_fails_is_tried_again_until_it_works() -> None:
    left = [OSError("reset"), OSError("reset")]

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert persist("write x", call, patience_s=30) == "done"


def test_what_never_works_ends_in_time_with_the_cause() -> None:
    tries: list[float] = []

    def call() -> None:
        tries.append(time.monotonic())
        raise ConnectionResetError("again")

    with pytest.raises(
        StorageFailed, match=r"cannot write x: ConnectionResetError: again; retried"
    ):
        persist("write x", call, patience_s=0.5)
    assert len(tries) > 1


@pytest.mark.parametrize(
    "error", [StorageFailed("refused"), InputError("no"), FileNotFoundError("x"), KeyError("bug")]
)
def test_what_will_not_pass_is_not_tried_again(error: Exception) -> None:
    tries: list[Callable[..., Any]] = []

    def call() -> None:
        tries.append(call)
        raise error

    with pytest.raises(type(error)):
        persist("write x", call, patience_s=30)
    assert len(tries) == 1


class AzuresError(Exception):
    """As azure.core's HttpResponseError: a code in an attribute, a message of many lines."""

    __module__ = "azure.core.exceptions"
    error_code = "ContainerNotFound"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("ContainerNotFound", "the container does not exist"),
        ("AuthenticationFailed", "AZURE_STORAGE"),
    ],
)
def test_azures_refusals_are_not_tried_again(code: str, says: str) -> None:
    tries: list[str] = []

    def call() -> None:
        tries.append(code)
        error = AzuresError("refused\nRequestId: 1\nContent: <xml>")
        error.error_code = code
        raise error

    with pytest.raises(StorageFailed, match=f"cannot write x: {code}; .*{says}") as caught:
        persist("write x", call, patience_s=30)
    assert len(tries) == 1 and "RequestId" not in str(caught.value)


@pytest.mark.parametrize("name", ["s4", "2024-01-01", "", "s3://"])
def test_options_of_a_protocol_that_there_is_not_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"storage_options: got .*a protocol that fsspec knows"):
        configure({name: {"anon": True}})
