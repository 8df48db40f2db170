"""A wrong, slow or denied URI rejects only its own row, with a reason."""

from __future__ import annotations

import base64
import gzip
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import RejectRow, RetryShard, StorageFailed
from batchgen.input import uris
from batchgen.input.reader import make_spans, read_span
from batchgen.input.uris import Uris
from batchgen.shard.prepare import prepare
from batchgen.storage import Limits, configure
from tests.datasets_on_disk import plan_for, png, write_columns
from tests.fuzzing import fuzz


class Web(BaseHTTPRequestHandler):
    """Serves good images, slow ones, decompression bombs and refusals, and GET of an S3 store."""

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        seen.append((self.path, self.headers.get("Accept-Encoding", "")))
        with suppress(ConnectionError):
            if name.startswith("slow"):
                self._answer(200, [("Content-Length", "100000")])
                while not over.wait(0.02):
                    self.wfile.write(b".")
            elif name.startswith("bomb"):
                packing = name.removeprefix("bomb-")
                self._answer(200, [("Content-Encoding", packing)], BOMB)
            elif name.startswith("code-"):
                code = name.removeprefix("code-")
                status = 400 if code == "ExpiredToken" else 403
                words = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
                self._answer(status, [("Content-Type", "application/xml")], words.encode())
            else:
                self._answer(200, [], b"picture")

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes = b"") -> None:
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        if body:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


seen: list[tuple[str, str]] = []
over = threading.Event()
BOMB = gzip.compress(bytes(100 << 20), 9)


@contextmanager
def web() -> Iterator[str]:
    over.clear()
    seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            over.set()
            server.shutdown()


def outcomes(found: object) -> dict[str, object]:
    assert isinstance(found, dict)
    return {uri: one.reason if isinstance(one, RejectRow) else one for uri, one in found.items()}


def test_every_kind_of_bad_uri_costs_its_row_and_is_shown_in_short(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    long = "x/" * 5000 + "a.png"
    bad = {
        "a\0.png": "bad-uri",
        "loop.png": "bad-uri",
        "folder": "bad-uri",
        "a.png/b.png": "bad-uri",
        "pipe": "bad-uri",
        "/dev/zero": "bad-uri",
        "n" * 300: "bad-uri",
        long: "bad-uri",
        "http://[bad/x": "bad-uri",
        "http://host:port/x": "bad-uri",
        "http:///x": "bad-uri",
        "http://a..b/x": "bad-uri",
        "http://host/a\nb": "bad-uri",
        "what://ever/x": "bad-uri",
        "nothing.png": "missing-uri",
        "data:image/png;base64,!!!": "bad-uri",
        "data:image/png;base64": "bad-uri",
        f"data:image/png;base64,{'A' * 5000}": "large-uri",
    }
    roots = (str(tmp_path), "/dev", "http://", "what://")
    found = Uris(str(tmp_path), roots, 1000, 5.0).fetch([*bad, "a.png"])
    assert outcomes(found) == {**bad, "a.png": b"picture"}
    for one in found.values():
        if isinstance(one, RejectRow):
            assert len(one.message) < 600 and "\n" not in one.message and "\0" not in one.message


@pytest.mark.parametrize("uri", ["data:image/png;base64,{}", "DATA:;BASE64,{}", "data:,{}"])
def test_an_image_may_stand_in_its_uri(uri: str) -> None:
    plain = "".join(f"%{byte:02x}" for byte in png())
    text = plain if uri == "data:,{}" else base64.b64encode(png()).decode()
    for given_text in (text, text.rstrip("=")):
        (one,) = Uris("/in", (), 1000, 5.0).fetch([uri.format(given_text)]).values()
        assert one == png()


def test_a_file_that_may_not_be_read_costs_its_row_and_a_sick_disk_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise error

    monkeypatch.setattr("batchgen.storage.inputs.open_regular", refuse)
    allowed = Uris(str(tmp_path), (str(tmp_path),), 1000, 5.0)
    error: OSError = PermissionError(13, "Permission denied", "a.png")
    assert outcomes(allowed.fetch(["a.png"])) == {"a.png": "denied-uri"}
    error = OSError(5, "Input/output error")
    with pytest.raises(RetryShard, match="Input/output"):
        allowed.fetch(["a.png"])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="of Linux")
def test_a_file_without_a_size_costs_its_row() -> None:
    """Files in /proc: an error from reading process memory was taken for a disk fault."""
    allowed = Uris("/proc", ("/proc",), 1000, 5.0)
    assert outcomes(allowed.fetch(["/proc/self/mem", "/proc/self/environ"])) == {
        "/proc/self/mem": "bad-uri",
        "/proc/self/environ": "bad-uri",
    }


def test_a_denied_key_costs_its_row_and_wrong_credentials_stop_the_job() -> None:
    with web() as address:
        options = {"endpoint_url": address, "key": "k", "secret": "s" * 20}
        configure({"s3": options}, Limits(patience_s=1.0))
        try:
            allowed = Uris("s3://bucket", ("s3://bucket",), 1000, 10.0)
            rows = {
                "a.png": b"picture",
                "code-AccessDenied": "denied-uri",  # also what S3 says of a key that is not there
                "code-InvalidObjectState": "denied-uri",
                "code-KeyTooLongError": "bad-uri",
                "code-NoSuchKey": "missing-uri",
            }
            assert outcomes(allowed.fetch(rows)) == rows
            for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
                with pytest.raises(StorageFailed, match=code):
                    allowed.fetch([f"code-{code}"])
        finally:
            configure()


def test_slow_uris_cost_no_neighbour_and_their_time_begins_when_they_are_asked_for() -> None:
    slow, good = [f"slow-{n}.png" for n in range(20)], [f"{n}.png" for n in range(20)]
    with web() as root:
        began = time.monotonic()
        found = Uris(root, (root,), 1000, 0.4).fetch([*slow, *good])
        took = time.monotonic() - began
    wanted = {**dict.fromkeys(slow, "uri-timeout"), **dict.fromkeys(good, b"picture")}
    assert outcomes(found) == wanted
    assert took < 4  # three rounds of at most eight slow ones


def test_what_is_slow_gives_its_place_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uris, "SLOW_S", 0.05)
    slow = [f"slow-{n}.png" for n in range(40)]
    with web() as root:
        began = time.monotonic()
        found = Uris(root, (root,), 1000, 1.5).fetch([*slow, "a.png"])
        took = time.monotonic() - began
    assert outcomes(found) == {**dict.fromkeys(slow, "uri-timeout"), "a.png": b"picture"}
    assert took < 4  # one after the other, eight at a time, it would be 7.5 s


def test_who_watches_the_shard_is_told_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uris, "_LOOK_S", 0.1)
    told: list[tuple[str, ...]] = []
    with web() as root:
        columns = {"prompt": ["a"], "image": [f"{root}/slow.png"]}
        path = write_columns(tmp_path / "a.parquet", columns)
        plan = plan_for(
            path,
            task="image-to-image",
            input__columns__image="image",
            input__uri_roots=[root],
            input__uri_timeout_s=1.0,
        )
        (span,) = make_spans(plan, [0])
        (rows,) = read_span(span, plan.spec, ["prompt", "image"])
        prepared = prepare(rows, plan, working_on=lambda keys: told.append(tuple(keys)))
    assert prepared.dropped[0].reason == "uri-timeout"
    assert told.count(()) >= 4


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_a_packed_answer_is_unpacked_no_further_than_the_limit(packing: str) -> None:
    with web() as root:
        allowed = Uris(root, (root,), 1 << 20, 30.0)
        allowed.fetch(["a.png"])  # what is loaded at first
        tracemalloc.start()
        found = allowed.fetch([f"bomb-{packing}"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert outcomes(found) == {f"bomb-{packing}": "large-uri"}
    assert peak < 16 << 20, peak  # 100 MiB when it was unpacked in one piece
    assert {asked for _, asked in seen} == {"identity"}


def test_a_packing_that_nobody_asked_for_is_refused() -> None:
    with web() as root:
        found = Uris(root, (root,), 1000, 10.0).fetch(["bomb-br"])
    assert outcomes(found) == {"bomb-br": "bad-uri"}


def test_no_secret_of_a_uri_is_shown() -> None:
    for uri in (
        "s3://KEY:abc/def-SECRET@bucket/x",
        "https://user:SECRET@host/x",
        "https://host/x?password=SECRET&code=SECRET",
        "simplecache::ftp://user:SECRET@host/x",
    ):
        (found,) = Uris("/in", ("/in", "https://a"), 1000, 1.0).fetch([uri]).values()
        assert isinstance(found, RejectRow) and "SECRET" not in found.message


@pytest.mark.parametrize(
    "rest",
    [
        "..%2fprivate/s.png",
        "..%2Fprivate/s.png",
        "a%2f..%2f..%2fprivate/s.png",
        "..%252fprivate/s.png",
        "..%5cprivate/s.png",
        "..\\private/s.png",
        "..;/private/s.png",
        ".\n./private/s.png",
        "%2e%2e/private/s.png",
        "../private/s.png",
    ],
)
def test_no_encoding_leads_out_of_a_folder_of_a_web_server(rest: str) -> None:
    allowed = Uris("http://h/photos", ("http://h/photos",), 1000, 1.0)
    for uri in (rest, f"http://h/photos/{rest}"):
        with pytest.raises(RejectRow) as caught:
            allowed.place(uri)
        assert caught.value.reason in ("forbidden-uri", "bad-uri")
        with pytest.raises(RejectRow):
            allowed._may_follow(uri)


def test_an_address_in_an_address_is_fine_where_a_whole_host_is_allowed() -> None:
    uri = "https://cdn/resize/https%3A%2F%2Fhost%2Fa.png"
    for root in ("https://", "https://cdn"):
        assert Uris("/in", (root,), 1000, 1.0).place(uri) == uri
    assert Uris("http://h/in", ("http://h/in",), 1, 1.0).place("100%25 a@2x.png")


PIECES = st.sampled_from(
    [
        *"/\\.%:@?#&;=[]~\0\n\t *",
        *("..", "%2f", "%2e", "%5c", "%252f", "::", "//", "file://", "http:", "s3://", "data:"),
        *("in", "out", "photos", "a.png", "é", "．", "h", "user:pw@", "?x=1"),
    ]
)
URIS = st.one_of(st.lists(PIECES, max_size=9).map("".join), st.text(max_size=20))


@fuzz(quick=200)
@given(URIS)
def test_no_uri_leads_out_of_the_roots_and_each_bad_one_is_a_reject(uri: str) -> None:
    for base, root in (
        ("http://h/photos", "http://h/photos"),
        ("s3://b/in", "s3://b/in"),
        ("/tmp/in", "/tmp/in"),
    ):
        allowed = Uris(base, (root,), 1000, 1.0)
        for one in (uri, f"{base}/{uri}"):
            try:
                place = allowed.place(one)
            except RejectRow as error:
                assert error.reason in ("bad-uri", "forbidden-uri") and error.message
                continue
            assert is_inside(place, root), (one, place)


def is_inside(place: str, root: str) -> bool:
    """As the library that asks for it, and a server that decodes as much as it can, would see."""
    if place.startswith("/"):
        return place == root or os.path.realpath(place).startswith(f"{root}/")
    if place.startswith("http"):
        place = str(yarl.URL(place).with_query(None).with_fragment(None))
        for _ in range(9):
            place = unquote(place).replace("\\", "/")
    scheme, _, path = place.partition("://")
    whole = f"{scheme}://{os.path.normpath(path)}"
    return whole == root or whole.startswith(f"{root}/")


@fuzz(quick=100)
@given(st.lists(URIS, min_size=1, max_size=4))
def test_whatever_a_row_names_is_its_bytes_or_its_reason(several: list[str]) -> None:
    found = Uris("/nowhere/in", ("/nowhere/in", "what://"), 1000, 5.0).fetch(several)
    assert set(found) == set(several)
    for one in found.values():
        assert isinstance(one, bytes | RejectRow)
