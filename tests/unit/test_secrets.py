"""A secret in a spec is refused wherever it is, and is not repeated in any message."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.cli import main
from batchgen.errors import BatchgenError, InputError, SpecError
from batchgen.secrets import redact, secret_in, without_secrets
from batchgen.spec.build import build
from batchgen.spec.storage_section import HARMLESS, check_options
from batchgen.spec.tree import merge
from batchgen.spec.yaml_text import parse_yaml
from batchgen.storage import configure, open_store
from tests.fuzzing import fuzz

MINIMAL: dict[str, Any] = {"input": "in.parquet", "output": "out"}
SECRET = "hunter2+h/unter=="
WORD = "hunter2hunter"


@pytest.fixture(autouse=True)
def _configured_as_before() -> Iterator[None]:
    yield
    configure()


def refusal(tree: dict[str, Any]) -> SpecError:
    with pytest.raises(SpecError) as caught:
        build(merge(MINIMAL, tree))
    assert "hunter2" not in str(caught.value)
    return caught.value


URLS = [
    f"s3://KEY:{SECRET}@bucket/x",
    f"s3://{WORD}@bucket/x",
    f"ftp://u:{WORD}@host/x",
    f"simplecache::ftp://u:{WORD}@host/x",
    f"zip://*.parquet::https://u:{WORD}@host/x.zip",
    f"https://u%3A{WORD}%40127.0.0.1:1/x.parquet",
    f"s3://u%3a{WORD}%40bucket/x.parquet",
    f"https://host/x?api-key={WORD}",
    f"https://host/x?password={WORD}",
    f"https://host/x?code={WORD}",
    f"https://host/x?{WORD}",
    f"https://host/x?version=3;sig={WORD}",
    f"https://host/x#access_token={WORD}",
    f"HTTPS://host/x?download=true&k={WORD}",
    f"s3://bucket/x?X-Amz-Signature={WORD}",
    f"https://host/x?q='{WORD}'",
    f"https://host/x?q=a b {WORD}",
]
PLACES = [
    *("input.path", "output.url", "model.path", "model.config", "model.components.vae"),
    *("storage_options.s3.endpoint_url", "output.license"),
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("field", PLACES)
def test_a_secret_in_a_url_is_refused_wherever_it_stands(field: str, url: str) -> None:
    assert refusal({field: url}).field == field


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("field", ["input.uri_roots", "model.components.controlnet"])
def test_a_secret_in_a_list_of_urls_is_refused(field: str, url: str) -> None:
    assert refusal({field: ["https://host/x", url]}).field == field


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/part-0?.parquet",
        "s3://bucket/date=2024/x@y.parquet",
        "https://host:8080/x@y/z.parquet",
        "https://host/x?download=true&version=3",
        "hf://datasets/owner/name@main/x.parquet",
        "/home/me/a?b=c@d.parquet",
    ],
)
def test_what_is_no_secret_passes_and_is_shown_as_it_is(url: str) -> None:
    assert secret_in(url) is None
    assert build(merge(MINIMAL, {"input.path": url})).input.path == url
    assert without_secrets(url) == url.partition("?download")[0]


OPTIONS: list[Any] = [
    {"http": {"headers": {"Authorization": f"Bearer {WORD}"}}},
    {"http": {"client_kwargs": {"headers": {"X-Api-Key": WORD}}}},
    {"http": {"client_kwargs": {"cookies": {"session": WORD}}}},
    {"http": {"client_kwargs": {"auth": ["u", WORD]}}},
    {"s3": {"client_kwargs": [{"secret": WORD}]}},
    {"s3": {"client_kwargs": {"endpoint_url": f"http://u:{WORD}@host"}}},
    {"s3": {"profile": {"name": WORD}}},
    {"s3": {"pin": WORD, "anon": False}},
    {"ftp": {"host": "h", "username": "me", "password": WORD}},
    {"gs": {"token": {"type": WORD}}},
    {"az": {"sas": [WORD]}},
    {"s3": {WORD: WORD}},
    {"s3": WORD},
    WORD,
    [WORD],
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_literal_that_is_not_known_to_be_harmless_is_refused(options: Any) -> None:
    if options != {"s3": {WORD: WORD}}:
        refusal({"storage_options": options})
    with pytest.raises(SpecError):
        check_options(options)


@pytest.mark.parametrize(
    "name", ["storage_option", "storage.s3", "output.s3", "strage", "model.s3"]
)
def test_a_slip_of_the_pen_does_not_show_what_was_meant_to_be_hidden(name: str) -> None:
    refusal({name: {"secret": WORD}})
    refusal({name: WORD})
    refusal({name: [WORD]})


def test_numbers_are_secrets_where_their_name_says_so() -> None:
    said = refusal({"storage_options": {"ftp": {"password": 271828, "timeout": 5}}})
    assert "271828" not in str(said) and said.field == "storage_options.ftp.password"


def test_harmless_options_and_references_pass() -> None:
    options = {
        "s3": {
            "profile": "work",
            "anon": False,
            "endpoint_url": "http://127.0.0.1:9000",
            "secret": "${MY_SECRET}",
            "client_kwargs": {"region_name": "eu-west-1"},
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        },
        "gs": {"token": "google_default", "project": "p"},
        "http": {"headers": {"Authorization": "${BEARER}", "User-Agent": "batchgen"}},
    }
    spec = build(merge(MINIMAL, {"storage_options": options}))
    assert spec.storage_options == options


def test_references_in_lists_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.config

    monkeypatch.setenv("MY_SECRET", WORD)
    configure({"http": {"client_kwargs": {"auth": ["me", "${MY_SECRET}"]}}})
    assert fsspec.config.conf["http"]["client_kwargs"]["auth"] == ["me", WORD]
    assert WORD not in redact(f"cannot reach it as {WORD}")


@pytest.mark.parametrize(
    "words",
    [
        ["--set", f"storage_options.s3.secret:{WORD}"],
        ["--set", f"storage_options.s3={{secret: {WORD}"],
        ["--set", f"storage_options.s3.secret=!{WORD}"],
        ["--set", f"storage_options.s3.secret=*{WORD}"],
        ["--set", f"storage_options.s3.secret={WORD}"],
        ["--set", f"storage_options={WORD}"],
        ["--input", f"https://127.0.0.1:9/x?api-key={WORD}"],
        [
            "--input",
            f"https://127.0.0.1:9/x?page=3&version={WORD}",
            "--set",
            "storage.patience_s=1",
        ],
        ["--output", f"simplecache::ftp://u:{WORD}@h/x"],
    ],
)
def test_no_command_repeats_a_secret(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--input", "in.parquet", "--output", "out", *words])
    said = "".join(capsys.readouterr())
    assert ended.value.code in (1, 3) and WORD not in said and "Traceback" not in said


def test_a_yaml_error_repeats_nothing_of_the_file() -> None:
    for text in (f"a: {WORD}: {WORD}", f"a: *{WORD}", f"a: !{WORD} x", f"a: '{WORD}", f"%{WORD} a"):
        with pytest.raises(InputError) as caught:
            parse_yaml(text, "spec file x")
        assert WORD not in str(caught.value) and "spec file x" in str(caught.value)


names = st.text("abcdefghijklmnopqrstuvwxyz_-.", min_size=1, max_size=12)
urls = st.builds(
    "{}{}://{}".format,
    st.sampled_from(["", "simplecache::", "zip://x::"]),
    st.sampled_from(["s3", "gs", "az", "ftp", "sftp", "http", "https", "memory", "hf"]),
    st.one_of(
        st.builds("{}:{}@host/x".format, names, st.just(SECRET)),
        st.builds("host/x?{}={}".format, names.filter(lambda n: n.strip(".-")), st.just(WORD)),
        st.builds("host/x?version=1&{}={}".format, names, st.just(WORD)),
    ),
).filter(lambda url: not any(f"{one}=" in url.lower() for one in ("version", "ref", "rev")))
values = st.recursive(
    st.one_of(st.just(WORD), st.just(SECRET), urls),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=2),
        st.dictionaries(names, inner, min_size=1, max_size=2),
    ),
    max_leaves=4,
)
sections = st.sampled_from(
    ["input", "model", "sampling", "conditioning", "output", "resources", "policy", "storage"]
)


@fuzz()
@given(st.data())
def test_no_planted_secret_is_kept_or_repeated(data: st.DataObject) -> None:
    """In storage options, under an unknown name, or in a URL."""
    if data.draw(st.booleans()):
        field = data.draw(
            st.sampled_from(["input.path", "output.url", "model.path", "input.uri_roots"])
        )
        value = data.draw(urls)
        value = [value] if field.endswith("roots") else value
    else:
        protocol = st.sampled_from(["s3", "gs", "http", "ftp", "x"])
        known = names.filter(lambda name: name.rpartition(".")[2] not in HARMLESS)
        options = st.builds("storage_options.{}.{}".format, protocol, known)
        slips = st.builds("{}.x{}".format, sections, names)
        field, value = data.draw(st.one_of(options, slips, names)), data.draw(values)
    try:
        spec = build(merge(MINIMAL, {field: value}))
    except BatchgenError as error:
        assert "hunter2" not in str(error) and "hunter2" not in repr(error)
    else:
        assert "hunter2" not in spec.to_yaml()


def test_files_of_a_run_follow_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o077, 0o600), (0o022, 0o644)):
        before = os.umask(mask)
        try:
            store = open_store(str(tmp_path / str(mask)))
            store.put("_batchgen/job.yaml", b"x")
            store.put_new("_batchgen/plan.json", b"x")
        finally:
            os.umask(before)
        for name in ("job.yaml", "plan.json"):
            path = tmp_path / str(mask) / "_batchgen" / name
            assert stat.S_IMODE(path.stat().st_mode) == mode
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o777 & ~mask
