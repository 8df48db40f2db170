"""A stand-in for the Hugging Face Hub on this machine: as much of its HTTP API as uploads need.

The requests and answers are those of `huggingface_hub` 2.4 and of the Git LFS batch API.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "hf_standin"
LARGE = (".parquet", ".tar", ".png", ".jpg", ".webp", ".apng")  # as the Hub's .gitattributes has it
PAGE = 3  # files on a page of a listing
MAIN = "main"


@dataclass(frozen=True)
class Blob:
    """A file of a repository: its content, and whether it is in large file storage."""

    data: bytes
    large: bool

    def listed(self, path: str) -> dict[str, Any]:
        told: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.data),
            "oid": hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest(),
        }
        if self.large:
            digest = hashlib.sha256(self.data).hexdigest()
            told["lfs"] = {"oid": digest, "size": len(self.data), "pointerSize": 134}
        return told


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, Blob]] = field(default_factory=lambda: {MAIN: {}})
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)  # branch, title, paths


@dataclass
class Hub:
    """The state of the stand-in, and what it was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)  # sha256 of each upload, in their order
    before: Callable[[str, str], int | None] = lambda method, path: None  # a status, to fail with
    after: Callable[[str, str], int | None] = lambda method, path: None  # once the work is done

    def files(self, repo: str, branch: str = MAIN) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo].branches[branch].items()}

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """The environment in which it is the hub."""
        told = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return {**os.environ, **told, **({"HF_TOKEN": token} if token else {})}


@contextmanager
def running() -> Iterator[Hub]:
    """A stand-in that serves while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Fault(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status)
        self.status, self.code = status, code


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunked()
        path = urllib.parse.unquote(url.path)
        try:
            self._fail(self.hub.before, path)
            answer = self._answer(path, urllib.parse.parse_qs(url.query), body)
            self._fail(self.hub.after, path)
        except _Fault as fault:
            return self._send(fault.status, b'{"error": "refused"}', {"X-Error-Code": fault.code})
        if isinstance(answer, Blob):
            digest = hashlib.sha256(answer.data).hexdigest()
            told = {"ETag": f'"{digest}"', "X-Repo-Commit": self._commit_id()}
            return self._send(200, answer.data, told)
        data, headers = answer
        self._send(200, json.dumps(data).encode(), headers)

    def _fail(self, hook: Callable[[str, str], int | None], path: str) -> None:
        status = hook(self.command, path)
        if status is not None:
            raise _Fault(status)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if path.startswith("/lfs/"):
            return self._put(path.removeprefix("/lfs/"), body)
        self._allow(path)
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(found[1], json.loads(body))
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(self._branch(self._repo(found[1]), found[2]), found[3])
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?", path)
        if found is None:
            raise _Fault(404)
        repo = self._repo(found[1])
        if found[2] in (None, "revision"):
            return self._info(found[1], repo, found[3] or MAIN)
        if found[2] == "branch":
            repo.branches.setdefault(found[3], dict(repo.branches[MAIN]))
            return {}, {}
        files = self._branch(repo, found[3])
        if found[2] == "tree":
            return self._tree(files, query)
        if found[2] == "preupload":
            return self._modes(json.loads(body))
        assert found[2] == "commit"
        return self._commit(repo, found[3], files, body)

    def _allow(self, path: str) -> None:
        writes = self.command in ("POST", "PUT")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Fault(401)

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _Fault(404, "RepoNotFound")
        return self.hub.repos[name]

    def _branch(self, repo: Repo, name: str) -> dict[str, Blob]:
        name = MAIN if name == self._commit_id() else name
        if name not in repo.branches:
            raise _Fault(404, "RevisionNotFound")
        return repo.branches[name]

    def _file(self, files: dict[str, Blob], path: str) -> Blob:
        if path not in files:
            raise _Fault(404, "EntryNotFound")
        return files[path]

    def _commit_id(self) -> str:
        return "c" * 40

    def _info(self, name: str, repo: Repo, branch: str) -> Any:
        files = self._branch(repo, branch)
        told = {"id": name, "private": repo.private, "sha": self._commit_id(), "tags": []}
        return {**told, "siblings": [{"rfilename": path} for path in files]}, {}

    def _create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        if name in self.hub.repos:
            raise _Fault(409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        return {"url": f"{self.hub.url}/datasets/{name}"}, {}

    def _tree(self, files: dict[str, Blob], query: dict[str, list[str]]) -> Any:
        start = int(query.get("cursor", ["0"])[0])
        paths = sorted(files)
        folders = sorted({os.path.dirname(path) for path in paths} - {""})
        told = [files[path].listed(path) for path in paths[start : start + PAGE]]
        if start == 0:
            told += [{"type": "directory", "path": one, "oid": "0" * 40} for one in folders]
        if start + PAGE >= len(paths):
            return told, {}
        url = urllib.parse.urlsplit(self.path)
        again = urllib.parse.urlencode(
            {**{name: values[0] for name, values in query.items()}, "cursor": start + PAGE}
        )
        return told, {"Link": f'<{self.hub.url}{url.path}?{again}>; rel="next"'}

    def _modes(self, asked: dict[str, Any]) -> Any:
        return {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in asked["files"]
            ]
        }, {}

    def _batch(self, name: str, asked: dict[str, Any]) -> Any:
        self._repo(name)
        told = []
        for one in asked["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}
            known = one["oid"] in self.hub.storage
            told.append({**one} if known else {**one, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": told}, {}

    def _put(self, digest: str, body: bytes) -> Any:
        assert self.command == "PUT" and hashlib.sha256(body).hexdigest() == digest
        self.hub.uploads.append(digest)
        self.hub.storage[digest] = body
        return {}, {}

    def _commit(self, repo: Repo, branch: str, files: dict[str, Blob], body: bytes) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        title = lines[0]["value"]["summary"]
        changed = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise _Fault(400)
                changed[value["path"]] = Blob(self.hub.storage[value["oid"]], True)
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                changed[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        files.update(changed)
        repo.commits.append((branch, title, sorted(changed)))
        oid = hashlib.sha1(str(len(repo.commits)).encode()).hexdigest()
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/c/{oid}"}, {}
