"""The context of an attack: a fresh folder, the real command line, streams and servers."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.attacks.fork_server import Server
from tests.attacks.kit import HERE, PY, Out, free_slot, slot
from tests.attacks.processes import kill_group

BASES = threading.Lock()


class Ctx:
    def __init__(self, root: Path, folder: Path, id: str) -> None:
        self.root = root
        self.folder = folder
        self.id = id
        self.dir = folder / id.replace("/", "_")
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        self.servers: list[Any] = []
        self.procs: list[subprocess.Popen] = []
        self.notes: list[str] = []

    # ---- processes
    def env(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "AWS_ENDPOINT_URL")}
        env |= {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return env | (extra or {})

    def popen(
        self,
        args: list[str],
        *,
        env: Any = None,
        cwd: Any = None,
        log: str | None = None,
        prefix: Any = (),
        limit_gb: Any = None,
    ) -> subprocess.Popen:
        out = (self.dir / (log or f"log{len(self.procs)}.txt")).open("wb")

        def pre() -> None:
            if limit_gb:
                resource.setrlimit(resource.RLIMIT_AS, (int(limit_gb * 2**30),) * 2)

        p = subprocess.Popen(
            [*prefix, *args],
            env=self.env(env),
            cwd=cwd or self.dir,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=pre,
        )
        p.log = Path(out.name)  # type: ignore[attr-defined]
        self.procs.append(p)
        return p

    def start(self, *args: str, **kw: Any) -> subprocess.Popen:
        """A CLI command in the background; the caller holds a slot."""
        return self.popen([PY, "-m", "batchgen", *map(str, args)], **kw)

    def exec(
        self,
        cmd: list[str],
        *,
        timeout: float = 120.0,
        heavy: bool = False,
        env: Any = None,
        cwd: Any = None,
        limit_gb: Any = None,
        input: bytes | None = None,
        prefix: Any = (),
    ) -> Out:
        with slot() if heavy else contextlib.nullcontext():
            t = time.monotonic()

            def pre() -> None:
                if limit_gb:
                    resource.setrlimit(resource.RLIMIT_AS, (int(limit_gb * 2**30),) * 2)

            fo, fe = (self.dir / "_o").open("w+b"), (self.dir / "_e").open("w+b")
            p = subprocess.Popen(
                [*prefix, *map(str, cmd)],
                env=self.env(env),
                cwd=cwd or self.dir,
                stdout=fo,
                stderr=fe,
                stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=pre,
            )
            self.procs.append(p)
            if input is not None:
                with contextlib.suppress(OSError):
                    p.stdin.write(input)
                    p.stdin.close()
            timed = False
            rss = 0.0
            deadline = t + timeout
            while True:
                pid, status, usage = os.wait4(p.pid, os.WNOHANG)
                if pid:
                    p.returncode = os.waitstatus_to_exitcode(status)
                    rss = usage.ru_maxrss / 1024
                    break
                if time.monotonic() > deadline:
                    timed = True
                    kill_group(p)
                    break
                time.sleep(0.05)
            fo.seek(0)
            fe.seek(0)
            o = fo.read(3_000_000).decode(errors="replace")
            e = fe.read(3_000_000).decode(errors="replace")
            fo.close()
            fe.close()
            return Out(
                p.returncode if p.returncode is not None else -9,
                o,
                e,
                time.monotonic() - t,
                timed,
                rss,
            )

    def cli(self, *args: Any, timeout: Any = None, heavy: Any = None, **kw: Any) -> Out:
        word = str(args[0]) if args else ""
        if heavy is None:
            heavy = (
                word in ("run", "resume", "submit") or (word == "doctor" and len(args) > 1)
            ) and "--dry-run" not in args
        env = kw.get("env") or {}
        if not heavy and not kw.get("prefix") and "PYTHONPATH" not in env and word != "run":
            return self.forked("cli", [str(a) for a in args], timeout or 60, **kw)
        return self.exec(
            [PY, "-m", "batchgen", *map(str, args)],
            heavy=heavy,
            timeout=timeout or (180 if heavy else 60),
            **kw,
        )

    def forked(
        self,
        kind: str,
        argv: list[str],
        timeout: float,
        *,
        env: Any = None,
        cwd: Any = None,
        limit_gb: Any = None,
        input: Any = None,
        prefix: Any = (),
    ) -> Out:
        self.count = getattr(self, "count", 0) + 1
        o, e = self.dir / f"_o{self.count}", self.dir / f"_e{self.count}"
        i = None
        if input is not None:
            i = self.dir / "_i"
            i.write_bytes(input)
        t = time.monotonic()
        rc, rss, timed = Server.of(self).ask(
            {
                "kind": kind,
                "argv": argv,
                "cwd": str(cwd or self.dir),
                "env": env or {},
                "limit_gb": limit_gb,
                "o": str(o),
                "e": str(e),
                "i": i and str(i),
            },
            timeout,
        )

        def take(p: Any) -> Any:
            with open(p, "rb") as f:
                b = f.read(3_000_000)
            p.unlink(missing_ok=True)
            return b.decode(errors="replace")

        return Out(rc, take(o), take(e), time.monotonic() - t, timed, rss)

    def inproc(
        self,
        *specs: dict,
        timeout: int = 240,
        env: Any = None,
        times: int = 1,
        limit_gb: Any = None,
        prefix: Any = (),
        extra: str = "",
    ) -> list[dict]:
        """Each dotted spec through the checkout's own stream: its error, or nothing."""
        f = self.dir / f"specs{time.monotonic_ns()}.json"
        f.write_text(json.dumps({"specs": specs, "times": times, "extra": extra}))
        if prefix:
            o = self.exec(
                [PY, "-P", str(HERE / "inproc.py"), str(f)],
                heavy=True,
                timeout=timeout,
                env=env,
                limit_gb=limit_gb,
                prefix=prefix,
            )
        else:
            o = self.forked(
                "inproc", [str(f)], timeout, env=env, limit_gb=limit_gb
            )  # no torch to load: no slot
        self.last_out = o
        found = []
        for line in o.out.splitlines():
            if line.startswith("@@"):
                found.append(json.loads(line[2:]))
        while len(found) < len(specs) * times:
            found.append({"type": "TIMEOUT" if o.timed_out else f"DIED rc {o.rc}", "error": o.last})
        return found

    # ---- inputs and bases
    def table(self, name: str, data: Any, **kw: Any) -> Path:
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(data if isinstance(data, pa.Table) else pa.table(data), path, **kw)
        return path

    def prompts(
        self, n: int = 8, name: str = "p.parquet", word: str = "circle", **cols: Any
    ) -> Path:
        return self.table(name, {"prompt": [f"a red {word} {i}" for i in range(n)], **cols})

    def base(self, fmt: str = "parquet", name: str = "out") -> Path:
        """A copy of a finished output of 8 rows in two shards of four, with labels."""
        home = self.folder / f"_base-{fmt}"
        if not (home / "done").exists():
            with slot(), BASES:  # the slot first: who makes a base waits for none
                if not (home / "done").exists():
                    self.make_base(home, fmt)
        target = self.dir / name
        shutil.copytree(home / "out", target)
        return target

    def make_base(self, home: Path, fmt: str) -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        prompts = [f"a red circle {i}" for i in range(8)]
        pq.write_table(pa.table({"prompt": prompts, "label": ["a", "b"] * 4}), home / "p.parquet")
        o = self.cli(
            *("run", "--input", home / "p.parquet", "--output", home / "out", "--steps", 1),
            *("--samples-per-shard", 4, "--label-column", "label"),
            *("--set", f"output.format={fmt}"),
            timeout=240,
        )
        if o.rc:
            raise RuntimeError(f"base {fmt}: rc {o.rc}: {o.text[-2000:]}")
        (home / "done").touch()

    @property
    def base_input(self) -> Path:
        return self.folder / "_base-parquet" / "p.parquet"

    def serve(self, handler: Callable[[BaseHTTPRequestHandler], None]) -> tuple[str, list[str]]:
        seen: list[str] = []

        class H(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _go(self) -> None:
                seen.append(f"{self.command} {self.path}")
                try:
                    handler(self)
                except OSError:
                    self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _go

            def log_message(self, *a: Any) -> None:
                pass

        s = ThreadingHTTPServer(("127.0.0.1", 0), H)
        s.handle_error = lambda *a: None
        s.daemon_threads = True
        threading.Thread(target=s.serve_forever, daemon=True).start()
        self.servers.append(s)
        return f"http://127.0.0.1:{s.server_address[1]}", seen

    def close(self) -> None:
        free_slot()
        for p in self.procs:
            if p.poll() is None:
                kill_group(p)
        for s in self.servers:
            threading.Thread(target=s.shutdown, daemon=True).start()
