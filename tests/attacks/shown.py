"""Section 6: devices, terminals and labels."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file, spec
from tests.attacks.kit import PY, Result, attack
from tests.attacks.readers import rows_of


@attack(
    "6-devices",
    "",
    {
        "6-zero": "marker naming /dev/zero: verify and export (memory)",
        "6-fifo": "marker naming a FIFO, and a FIFO in the place of a data file: hang",
        "new-6-fifo-records": (
            "a FIFO or a link to /dev/zero as plan.json, marker, lease, job.yaml, rejects; "
            "a huge sparse marker (10 GB)"
        ),
    },
)
def a6v(ctx: Ctx) -> Result:
    r = {}

    def mark(out: Path, name: str) -> None:
        f = out / "_batchgen/shards/00000.json"
        m = json.loads(f.read_text())
        m["files"][0] |= {"name": name}
        f.write_text(json.dumps(m))

    def both(out: Path, tag: Any) -> Any:
        res = []
        for cmd in (
            ["verify", out],
            ["export", out, ctx.dir / f"t-{tag}", "--format", "webdataset"],
        ):
            o = ctx.cli(*cmd, timeout=25, limit_gb=6)
            res.append((o.timed_out, o.tb or "MemoryError" in o.text, o.rc, o))
        return not any(t or tb or rc == 0 for t, tb, rc, _ in res), "; ".join(
            f"{'HANG' if t else rc}{' TRACEBACK/MemoryError' if tb else ''}" for t, tb, rc, _ in res
        ) + f" ({res[0][3].msg(100)})"

    out = ctx.base(name="z1")
    mark(out, "/dev/zero")
    a = both(out, "z1")
    out = ctx.base(name="z2")
    d = data_file(out)
    d.unlink()
    d.symlink_to("/dev/zero")
    b = both(out, "z2")
    r["6-zero"] = (a[0] and b[0], f"named: {a[1]}; linked: {b[1]}")
    out = ctx.base(name="f1")
    os.mkfifo(out / "data/fifo")
    mark(out, "data/fifo")
    a = both(out, "f1")
    out = ctx.base(name="f2")
    d = data_file(out)
    d.unlink()
    os.mkfifo(d)
    b = both(out, "f2")
    r["6-fifo"] = (a[0] and b[0], f"named: {a[1]}; in its place: {b[1]}")
    seen, good = [], True
    for what in ("plan.json", "shards/00000.json", "lease/00001.json", "job.yaml"):
        for kind in ("fifo", "zero", "sparse"):
            out = ctx.base(name=f"r-{what.replace('/', '-')}-{kind}")
            p = out / "_batchgen" / what
            p.unlink()
            if kind == "fifo":
                os.mkfifo(p)
            elif kind == "zero":
                p.symlink_to("/dev/zero")
            else:
                with open(p, "wb") as f:
                    f.truncate(10 << 30)
            for cmd in (["verify"], ["status"], ["resume"], ["export", "T"]):
                args = [cmd[0], out] + (
                    [ctx.dir / f"T{len(seen)}{kind}", "--format", "webdataset"]
                    if cmd[0] == "export"
                    else []
                )
                if cmd[0] == "export" and what == "job.yaml":
                    continue
                if len(seen) >= 6:
                    continue  # enough is known
                patience = 120 if cmd[0] == "resume" else 20  # it may make a shard again
                o = ctx.cli(*args, timeout=patience, heavy=False, limit_gb=6)
                bad = o.timed_out or o.tb or "MemoryError" in o.text or o.rc < 0
                good &= not bad
                if bad:
                    seen.append(
                        f"{cmd[0]} {what} {kind}: "
                        f"{'HANG' if o.timed_out else 'TRACEBACK' if o.tb else o.rc}"
                    )
    r["new-6-fifo-records"] = (good, "; ".join(seen) or "47 commands: none hangs")
    return r


def on_tty(ctx: Ctx, *args: Any, timeout: int = 40) -> str:
    """What a command writes to a terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.chdir(ctx.dir)
            os.execve(
                PY,
                [PY, "-m", "batchgen", *map(str, args)],
                ctx.env({"TERM": "xterm-256color", "COLUMNS": "200"}),
            )
        finally:
            os._exit(127)
    out, end = b"", time.monotonic() + timeout
    while time.monotonic() < end:
        if select.select([fd], [], [], 0.5)[0]:
            try:
                b = os.read(fd, 65536)
            except OSError:
                break
            if not b:
                break
            out += b
    else:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.waitpid(pid, 0)
    os.close(fd)
    return out.decode(errors="surrogateescape")


@attack(
    "6-ansi",
    (
        "ANSI in column and file names, spec values, failure messages and logs reaches the "
        "terminal (on a tty)"
    ),
)
def a6a(ctx: Ctx) -> Result:
    E = "\x1b]0;PWNED\x07\x1b[31mred\x9b5m"
    src = ctx.table("c.parquet", {"prompt" + E: ["a"], E: ["b"]})
    (ctx.dir / "d").mkdir()
    t = pa.table({"prompt": ["a"]})
    pq.write_table(t, ctx.dir / f"d/{E.replace('/', '')}.parquet")
    (ctx.dir / f"d/bad{E}.parquet").write_bytes(b"no")
    out = ctx.base()
    (out / "_batchgen/shards/00001.json").unlink()
    data_file(out, 1).unlink()
    (out / "_batchgen/failed").mkdir(exist_ok=True)
    (out / "_batchgen/failed/00001.json").write_text(
        json.dumps(
            {
                "shard": 1,
                "planned": 4,
                "error": E,
                "message": E,
                "traceback": E,
                "attempts": 1,
                "host": E,
                "failed_at": 1.0,
            }
        )
    )
    (out / "_batchgen/logs").mkdir(exist_ok=True)
    (out / "_batchgen/logs/00001.txt").write_text(f"hello {E}\n")
    m = out / "_batchgen/shards/00000.json"
    j = json.loads(m.read_text())
    j["files"][0]["name"] = f"data/{E}"
    m.write_text(json.dumps(j))
    (out / f"data/{E}x").write_bytes(b"")
    cases = {
        "plan-columns": ["plan", "--input", src, "--output", "o"],
        "plan-file": ["plan", "--input", ctx.dir / "d", "--output", "o"],
        "status": ["status", str(out)],
        "verify": ["verify", str(out)],
        "logs": ["logs", str(out)],
        "set": ["plan", "--input", src, "--output", "o", "--set", f"variants={E}"],
        "unknown-field": ["plan", "--input", src, "--output", "o", "--set", f"{E}=1"],
        "task": ["tasks", E],
        "input": ["plan", "--input", f"no{E}", "--output", "o"],
        "flag": ["plan", f"--{E}"],
        "command": [E],
        "clean": ["clean", str(out)],
        "export": ["export", str(out), str(ctx.dir / "t"), "--format", "webdataset"],
    }
    _seen, bad = [], []
    for k, args in cases.items():
        text = on_tty(ctx, *args)
        if (
            "\x1b]0;PWNED" in text
            or "\x1b[31mred" in text
            or "\x07" in text
            or "\x9b5m" in text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        ):
            bad.append(k)
    return not bad, f"raw on the terminal: {bad}" if bad else f"{len(cases)} commands: none"


@attack("6-labels", "image-folder labels CON, aux, COM1, and A beside a (Windows/macOS copies)")
def a6l(ctx: Ctx) -> Result:
    labels = [
        "CON",
        "aux",
        "COM1",
        "A",
        "a",
        "nul.txt",
        "x.",
        "x",
        " x",
        "LPT9",
        "Straße",
        "STRASSE",
        "é",
        "e\u0301",
        "CONIN$",
        "PRN",
    ]
    src = ctx.table("l.parquet", {"prompt": ["x"] * len(labels), "label": labels, "id": labels})
    seen, good = [], True
    for keyed in (False, True):
        out = ctx.dir / f"o{keyed}"
        got = ctx.inproc(
            spec(
                src,
                out,
                output__format="image-folder",
                input__columns__label="label",
                output__samples_per_shard=16,
                **({"input__columns__key": "id"} if keyed else {}),
            )
        )[0]
        names = sorted(p.name for p in (out / "data").iterdir()) if (out / "data").is_dir() else []
        import unicodedata

        low = [unicodedata.normalize("NFC", n).casefold() for n in names]
        reserved = [
            n
            for n in names
            if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?", n, re.I)
            or n[-1] in ". "
        ]
        meet = sorted({n for n in low if low.count(n) > 1})
        files = [p.name for p in (out / "data").rglob("*.png")]
        fres = [n for n in files if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", n, re.I)]
        files = [str(p.relative_to(out)) for p in (out / "data").rglob("*.png")]
        flow = [unicodedata.normalize("NFC", n).casefold() for n in files]
        fmeet = sorted({n for n in flow if flow.count(n) > 1}) if keyed else []
        g = (
            not reserved
            and not meet
            and not fres
            and not fmeet
            and len(rows_of(out)) == len(labels)
        )
        good &= g
        seen.append(
            f"keyed {keyed}: {len(rows_of(out))} rows, reserved {reserved + fres}, meet "
            f"{meet + fmeet} {got.get('error', '')[:100]}"
        )
    return good, "; ".join(seen)
