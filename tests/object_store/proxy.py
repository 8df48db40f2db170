"""An HTTP/1.1 proxy on loopback that injects faults of networks and object stores, by rules.

The Host header passes unchanged: it is signed, so the server checks what the client signed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["error", "reset", "cut", "cut-body", "lost", "latency", "hang"]
_CHUNK = 1 << 16


@dataclass
class Rule:
    """One fault and the requests it befalls.

    Attributes:
        kind: ``error``: an answer of ``status`` and ``code``; ``reset``: before the server sees the
            request; ``cut-body``: after ``after_bytes`` of the request's body; ``cut``: after
            ``after_bytes`` of the answer's; ``lost``: the server has answered, the client hears
            nothing; ``latency``: ``seconds`` later; ``hang``: no answer for ``seconds``.
        method, target: regular expressions of the method and of path?query.
        times: how often; None for ever.
        skip: matching requests that pass first.
        probability: of each matching request after those.
    """

    kind: Kind
    method: str = ""
    target: str = ""
    times: int | None = None
    skip: int = 0
    probability: float = 1.0
    seconds: float = 0.5
    status: int = 503
    code: str = "SlowDown"
    after_bytes: int = 100


@dataclass
class Seen:
    """A request as the proxy saw it: ``status`` 0 if the server was not asked."""

    method: str
    target: str
    fault: str
    status: int = 0
    body_bytes: int = 0


class _Broken(Exception):
    """Raised where a rule ends the connection."""


@dataclass
class _Head:
    text: bytes
    method: str
    target: str

    def number(self, name: bytes) -> int | None:
        found = re.search(rb"\r\n" + name + rb": *(\d+)", self.text.lower())
        return int(found[1]) if found else None

    def says(self, words: bytes) -> bool:
        return words in self.text.lower()


class FaultProxy:
    """Runs in a thread of this process while it is entered as a context."""

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.upstream_port = upstream_port
        self.port = 0
        self.log: list[Seen] = []
        self._rules: list[Rule] = []
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="s3-proxy", daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rules(self, *rules: Rule) -> None:
        """Replace all rules and clear the log."""
        with self._lock:
            self._rules = list(rules)
            self.log.clear()

    def faults(self) -> list[str]:
        """Kinds of the faults injected so far."""
        with self._lock:
            return [seen.fault for seen in self.log if seen.fault]

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._client, "127.0.0.1", 0, limit=1 << 20)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _pick(self, head: _Head) -> tuple[Rule | None, Seen]:
        with self._lock:
            rule = next((one for one in self._rules if self._befalls(one, head)), None)
            seen = Seen(head.method, head.target, rule.kind if rule else "")
            self.log.append(seen)
            return rule, seen

    def _befalls(self, rule: Rule, head: _Head) -> bool:
        if rule.times == 0 or not re.search(rule.method, head.method):
            return False
        if not re.search(rule.target, head.target):
            return False
        if rule.skip:
            rule.skip -= 1
            return False
        if self._dice.random() >= rule.probability:
            return False
        if rule.times is not None:
            rule.times -= 1
        return True

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server: list[asyncio.StreamWriter] = []
        ended = (ConnectionError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ended):
            with contextlib.suppress(_Broken):
                while await self._request(reader, writer, server):
                    pass
            _reset(writer)
        for one in (writer, *server):
            one.close()

    async def _request(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: list[asyncio.StreamWriter],
    ) -> bool:
        """One request and its answer; False when the connection is over."""
        text = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = text.split(b"\r\n", 1)[0].decode("latin1").split(" ")
        head = _Head(text, method, target)
        rule, seen = self._pick(head)
        kind = rule.kind if rule else ""
        if rule and kind in ("latency", "hang"):
            await asyncio.sleep(rule.seconds)
        if kind in ("reset", "hang"):
            raise _Broken
        if head.says(b"expect: 100-continue"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            text = re.sub(rb"(?i)\r\nexpect: *100-continue", b"", text)
        if rule and kind == "error":
            seen.body_bytes = await _copy_body(reader, None, head)
            writer.write(_answer(rule, method))
            await writer.drain()
            return False
        answers, up = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=1 << 20)
        server[:] = [up]
        up.write(text)
        limit = rule.after_bytes if rule and kind == "cut-body" else None
        seen.body_bytes = limit or 0  # if it is cut there
        seen.body_bytes = await _copy_body(reader, up, head, limit)
        await up.drain()
        await self._answer(answers, writer, head, rule, seen)
        up.close()
        return True

    async def _answer(
        self,
        answers: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        head: _Head,
        rule: Rule | None,
        seen: Seen,
    ) -> None:
        while True:
            text = await answers.readuntil(b"\r\n\r\n")
            seen.status = int(text.split(b" ")[1])
            if seen.status >= 200:
                break
        empty = head.method == "HEAD" or seen.status in (204, 304)
        answer = _Head(text, "", "")
        kind = rule.kind if rule else ""
        if kind == "lost":
            if not empty:
                await _copy_body(answers, None, answer)
            raise _Broken
        writer.write(text)
        limit = rule.after_bytes if rule and kind == "cut" else None
        if not empty:
            await _copy_body(answers, writer, answer, limit)
        await writer.drain()


async def _copy_body(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter | None,
    head: _Head,
    limit: int | None = None,
) -> int:
    """Hand on one body (by length or chunked); ends the connection after ``limit`` bytes."""
    sent = 0

    async def hand_on(data: bytes) -> None:
        nonlocal sent
        if writer is not None:
            writer.write(data if limit is None else data[: max(0, limit - sent)])
            await writer.drain()
        sent += len(data)
        if limit is not None and sent >= limit:
            await asyncio.sleep(0.02)  # let what was written leave before the reset
            raise _Broken

    if head.says(b"transfer-encoding: chunked"):
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            await hand_on(line + await reader.readexactly(size + 2))
        return sent
    left = head.number(b"content-length") or 0
    while left:
        data = await reader.read(min(left, _CHUNK))
        if not data:
            raise ConnectionError
        left -= len(data)
        await hand_on(data)
    return sent


def _answer(rule: Rule, method: str) -> bytes:
    body = f"<Error><Code>{rule.code}</Code><Message>injected</Message></Error>".encode()
    head = (
        f"HTTP/1.1 {rule.status} Injected\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if method == "HEAD" else head + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a reset, as a crash does."""
    one: socket.socket | None = writer.get_extra_info("socket")
    if one is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def kinds(seen: Iterable[Seen]) -> dict[str, int]:
    """Number of times that each fault happened."""
    counted: dict[str, int] = {}
    for one in seen:
        if one.fault:
            counted[one.fault] = counted.get(one.fault, 0) + 1
    return counted
