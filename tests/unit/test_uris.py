"""Conditioning images by URI: only from where the spec allows, within limits, row by row."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchgen.errors import RejectRow
from batchgen.input.uris import Uris, uris_of
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, png, spec_for, write_columns
from tests.outputs import rejects_of, table_of


def made(tmp_path: Path, images: Any, **settings: Any) -> tuple[list[str], dict[str, str]]:
    """(keys of accepted samples, source row -> reason) of an image-to-image run."""
    source = tmp_path / "in" / "rows.parquet"
    write_columns(source, {"prompt": ["a cat"] * len(images), "image": images})
    task = {
        "task": "image-to-image",
        "input__columns__image": "image",
        "policy__reject_flat": False,
    }
    plan = plan_for(source, tmp_path / "out", **{**task, **settings})
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    reasons = {
        row["source_id"].rpartition("#")[2]: row["reason"] for row in rejects_of(tmp_path / "out")
    }
    return table_of(tmp_path / "out").column("key").to_pylist(), reasons


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """``in/pictures/a.png`` inside the input's folder, ``secret.png`` outside of it."""
    folder = tmp_path / "in" / "pictures"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png())
    (folder / "long.png").write_bytes(png() + bytes(5000))
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def test_paths_are_read_from_the_inputs_own_folder_and_nowhere_else(
    tmp_path: Path, pictures: Path
) -> None:
    given = [
        "pictures/a.png",
        str(pictures / "a.png"),
        f"file://{pictures}/a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "pictures/link.png",
        "s3://elsewhere/a.png",
        "https://127.0.0.1:1/a.png",
        "simplecache::file:///etc/passwd",
        "pictures/nothing.png",
        "pictures/long.png",
        "",
        None,
    ]
    keys, reasons = made(tmp_path, given, input__uri_limit_bytes=4000)
    assert len(keys) == 3
    assert reasons == {
        **dict.fromkeys([str(row) for row in range(3, 9)], "forbidden-uri"),
        "9": "missing-uri",
        "10": "large-uri",
        "11": "null-image",
        "12": "null-image",
    }


def test_image_structs_may_name_what_they_do_not_hold(tmp_path: Path, pictures: Path) -> None:
    structs = pa.array(
        [
            {"bytes": png(), "path": "not/looked/at.png"},
            {"bytes": None, "path": "pictures/a.png"},
            {"bytes": None, "path": None},
        ],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    keys, reasons = made(tmp_path, structs)
    assert len(keys) == 2 and reasons == {"2": "null-image"}


def test_an_allowed_folder_and_no_other(tmp_path: Path, pictures: Path) -> None:
    given = [str(tmp_path / "secret.png"), "pictures/a.png"]
    keys, reasons = made(tmp_path, given, input__uri_roots=[str(tmp_path / "secret.png")])
    assert len(keys) == 1 and reasons == {"1": "forbidden-uri"}


def test_the_bytes_are_those_of_images_given_inline(tmp_path: Path, pictures: Path) -> None:
    made(tmp_path / "inline", [png()])
    (tmp_path / "named" / "in").mkdir(parents=True)
    (tmp_path / "named" / "in" / "a.png").write_bytes(png())
    made(tmp_path / "named", ["a.png"])
    digests = [table_of(tmp_path / name / "out").column("sha256") for name in ("inline", "named")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("path", "base", "roots"),
    [
        ("s3://bucket/in/*.parquet", "s3://bucket/in", ("s3://bucket",)),
        ("s3://bucket/in/a.parquet", "s3://bucket/in", ("s3://bucket",)),
        ("s3://bucket/in/", "s3://bucket/in", ("s3://bucket",)),
        ("/data/in", "/data/in", ("/data/in",)),
        ("/data/in/a.parquet", "/data/in", ("/data/in",)),
    ],
)
def test_what_is_allowed_by_default(path: str, base: str, roots: tuple[str, ...]) -> None:
    allowed = uris_of(spec_for(path))
    assert (allowed.base, allowed.roots) == (base, roots)


BUCKET = Uris("s3://bucket/in", ("s3://bucket/in", "https://"), 1000, 5.0)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("a.png", "s3://bucket/in/a.png"),
        ("s3://bucket/in/b/../a.png", "s3://bucket/in/a.png"),
        ("S3://bucket/in/a.png", "s3://bucket/in/a.png"),
        ("https://host/a?x=1", "https://host/a?x=1"),
    ],
)
def test_places(uri: str, place: str) -> None:
    assert BUCKET.place(uri) == place


@pytest.mark.parametrize(
    "uri",
    [
        "../a.png",
        "s3://bucket/in/../a.png",
        "s3://bucket/inner/a.png",
        "s3://bucket2/in/a.png",
        "/etc/passwd",
        "http://host/a",
        "https://user:password@host/a",
        "https://host/%2E%2e/a",
    ],
)
def test_what_leads_out_is_refused(uri: str) -> None:
    with pytest.raises(RejectRow) as caught:
        BUCKET.place(uri)
    assert caught.value.reason == "forbidden-uri"
    assert "password" not in caught.value.message


def test_what_takes_too_long_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(
        "batchgen.input.uris.read_limited", lambda *_, **__: release.wait(30) and b""
    )
    began = time.monotonic()
    try:
        found = Uris("/in", ("/in",), 1000, 0.1).fetch(["a.png"])
    finally:
        release.set()
    assert isinstance(found["a.png"], RejectRow) and found["a.png"].reason == "uri-timeout"
    assert time.monotonic() - began < 10


def test_each_object_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("a.png", b"x")
    asked: list[str] = []

    def read(place: str, *_: object) -> bytes:
        asked.append(place)
        return b"x"

    monkeypatch.setattr("batchgen.input.uris.read_limited", read)
    found = Uris(store.url, (store.url,), 1000, 5.0).fetch(["a.png", "b.png", "a.png"])
    assert found == {"a.png": b"x", "b.png": b"x"}
    assert sorted(asked) == [f"{store.url}/a.png", f"{store.url}/b.png"]


class Web(BaseHTTPRequestHandler):
    """Serves a few pages, and redirects to inside and outside of ``/pictures``."""

    def do_GET(self) -> None:
        asked.append(self.path)
        to = {
            "/pictures/moved.png": "/pictures/a.png",
            "/pictures/out.png": "/secret.png",
            "/pictures/elsewhere.png": "http://127.0.0.2:1/pictures/a.png",
            "/pictures/disk.png": "file:///etc/hostname",
            "/pictures/round.png": "/pictures/round.png",
        }.get(self.path)
        refused = {"/pictures/none.png": 404, "/pictures/private.png": 403}.get(self.path, 200)
        self.send_response(302 if to else refused)
        if to:
            self.send_header("Location", to)
        self.end_headers()
        body = bytes(1 << 20) if self.path.endswith("large.png") else b"picture"
        with suppress(ConnectionError):
            self.wfile.write(b"" if to else body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


asked: list[str] = []


def test_redirects_lead_nowhere_else() -> None:
    names = ("a", "moved", "out", "elsewhere", "disk", "round", "none", "private", "large")
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/pictures"
        found = Uris(root, (root,), 1000, 10.0).fetch([f"{name}.png" for name in names])
        server.shutdown()
    seen = {
        uri.removesuffix(".png"): one.reason if isinstance(one, RejectRow) else one
        for uri, one in found.items()
    }
    assert seen == {
        **dict.fromkeys(("a", "moved"), b"picture"),
        **dict.fromkeys(("out", "elsewhere", "disk"), "forbidden-uri"),
        "round": "bad-uri",
        "private": "denied-uri",
        "none": "missing-uri",
        "large": "large-uri",
    }
    assert "/secret.png" not in asked
