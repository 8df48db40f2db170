"""Client of a checkout's fork server, which imports the libraries once for all commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tests.attacks.kit import HERE, PY
from tests.attacks.processes import descendants

if TYPE_CHECKING:
    from tests.attacks.context import Ctx


class Server:
    """The fork server of one checkout."""

    all: ClassVar[dict[Path, Server]] = {}
    lock = threading.Lock()

    @classmethod
    def of(cls, ctx: Ctx) -> Server:
        with cls.lock:
            if ctx.root not in cls.all:
                cls.all[ctx.root] = cls(ctx)
            return cls.all[ctx.root]

    def __init__(self, ctx: Ctx) -> None:
        self.p = subprocess.Popen(
            [PY, "-P", str(HERE / "server.py")],
            env=ctx.env(),
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(ctx.folder / "_server.err").open("wb"),
        )
        self.n = 0
        self.wait: dict[int, dict] = {}
        self.cond = threading.Condition()
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self.ready.wait(180):
            raise RuntimeError("fork server did not start")

    def _read(self) -> None:
        for line in self.p.stdout:
            j = json.loads(line)
            if "ready" in j:
                self.ready.set()
            if "warn" in j:
                print("server:", j["warn"], file=sys.stderr)
            if "n" in j:
                with self.cond:
                    self.wait.setdefault(j["n"], {}).update(j)
                    self.cond.notify_all()

    def ask(self, q: dict, timeout: float) -> tuple[int, float, bool]:
        with self.cond:
            self.n += 1
            n = self.n
            self.p.stdin.write((json.dumps(q | {"n": n}) + "\n").encode())
            self.p.stdin.flush()
            end = time.monotonic() + timeout
            timed = False
            while "rc" not in self.wait.get(n, {}):
                left = end - time.monotonic()
                if left <= 0 and not timed:
                    timed = True
                    pid = self.wait.get(n, {}).get("started")
                    if pid:
                        for d in descendants(pid):
                            with contextlib.suppress(OSError):
                                os.kill(d, signal.SIGKILL)
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGKILL)
                    end = time.monotonic() + 20
                elif left <= 0:
                    return -9, 0.0, True
                self.cond.wait(max(0.05, min(left, 1.0)))
            j = self.wait.pop(n)
        return j["rc"], j["rss"], timed
