"""First use: outputs, exports and their checks."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file, retable, send, set_cell
from tests.attacks.first_use import TB
from tests.attacks.kit import Result, attack, slot
from tests.attacks.processes import kill_group, wait_until
from tests.attacks.readers import markers_of, rows_of


@attack(
    "B10",
    "",
    {
        "B10-closed-port": (
            "a closed port in --address hangs 13 min, deaf to Ctrl-C (bounded here at 45 s)"
        ),
        "B10-http": "--address http://HEAD:8265 given to run prints Ray's text about RAY_ADDRESS",
        "new-B10-deaf": "a port that accepts and never answers; an http server; junk addresses",
    },
)
def b10(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(4)

    def go(addr: Any, n: Any, timeout: int = 45) -> Any:
        with slot():
            t = time.monotonic()
            p = ctx.start(
                "run",
                "--input",
                src,
                "--output",
                ctx.dir / f"o{n}",
                "--steps",
                1,
                "--address",
                addr,
            )
            try:
                rc = p.wait(timeout)
            except subprocess.TimeoutExpired:
                rc = None
                p.send_signal(signal.SIGINT)
                try:
                    p.wait(15)
                except subprocess.TimeoutExpired:
                    kill_group(p)
                    rc = "deaf"
            secs = time.monotonic() - t
        return rc, secs, p.log.read_text(errors="replace")

    def msg(log: Any) -> Any:
        return next(
            (line for line in log.splitlines() if line.startswith("batchgen:")), log.strip()[-100:]
        )[:170]

    rc, secs, log = go("127.0.0.1:6399", 1)
    r["B10-closed-port"] = (
        rc in (1, 3) and secs < 40 and TB not in log and "6399" in log,
        f"rc {rc} after {secs:.0f} s; {msg(log)}",
    )
    rc, secs, log = go("http://127.0.0.1:8265", 2)
    r["B10-http"] = (
        rc == 1 and "RAY_ADDRESS" not in log and "submit" in log,
        f"rc {rc} after {secs:.0f} s; {msg(log)}",
    )

    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    s.listen(50)
    base, _ = ctx.serve(lambda q: send(q, b"hi"))
    seen, good = [], True
    for a in (
        f"127.0.0.1:{s.getsockname()[1]}",
        base.removeprefix("http://"),
        "nohost.invalid:6379",
        "127.0.0.1",
        "127.0.0.1:99999",
        "ray://127.0.0.1:1",
        ":::",
    ):
        rc, secs, log = go(a, len(seen) + 5, 60)
        g = rc in (1, 3) and TB not in log
        good &= g
        seen.append(
            f"{a}: {rc} in {secs:.0f} "
            f"s{' TB' if TB in log else ''}{'' if g else ' ' + msg(log)[:60]}"
        )
    r["new-B10-deaf"] = (good, "; ".join(seen))
    return r


def one_missing(ctx: Ctx, hurt: Any, r: dict[str, Any]) -> None:
    out = ctx.base(name="b")
    first = {x["key"]: x["sha256"] for x in rows_of(out)}
    data_file(out).unlink()
    v, s, o = ctx.cli("verify", out), ctx.cli("status", out), ctx.cli("resume", out)
    q = ctx.cli("verify", "--quick", out)
    r["B12-missing"] = (
        v.rc == 4
        and s.rc not in (0,)
        and o.rc != 0
        and "None bytes" not in q.text
        and not (s.tb or o.tb),
        (
            f"verify {v.rc}, status {s.rc}, resume {o.rc}, --quick says 'None bytes': "
            f"{'None bytes' in q.text}; {s.last[:160]}"
        ),
    )
    a = ctx.cli("verify", out, "--repair", heavy=True, timeout=180)
    mid = sorted(markers_of(out))
    b = ctx.cli("resume", out) if not (a.rc == 0 and len(mid) == 2) else a
    v = ctx.cli("verify", out)
    same = {x["key"]: x["sha256"] for x in rows_of(out)} == first
    out2 = ctx.base(name="c")
    hurt(out2)
    c = ctx.cli("resume", out2, "--verify", timeout=180)
    v2 = ctx.cli("verify", out2)
    r["B12-repair"] = (
        (v.rc == 0 and same and v2.rc == 0 and not a.tb and "00000" in a.text + c.text)
        or (v.rc == 0 and same and v2.rc == 0 and not a.tb and "shard 0" in a.text),
        (
            f"--repair rc {a.rc}, then resume {b.rc}, verify {v.rc}, same bytes {same}; "
            f"resume --verify rc {c.rc}, verify {v2.rc}; {a.text.strip()[:160]}"
        ),
    )


def many_repairs(ctx: Ctx, r: dict[str, Any]) -> None:
    seen, good = [], True
    for fmt in ("parquet", "webdataset", "image-folder"):
        for what in ("both", "extra", "tamper", "rejects", "marker"):
            out = ctx.base(fmt, name=f"{fmt}-{what}")
            first = {x["key"]: x["sha256"] for x in rows_of(out)}
            files = [
                p
                for p in sorted((out / "data").rglob("*"))
                if p.is_file() and p.suffix in (".parquet", ".tar", ".png")
            ]
            if what == "both":
                for f in (files[0], files[-1]):
                    f.unlink()
            elif what == "extra":
                (out / "data/extra.bin").write_bytes(b"x")
            elif what == "marker":
                (out / "_batchgen/shards/00001.json").write_bytes(b"{")
            elif what == "tamper":
                if fmt != "parquet":
                    continue
                retable(out, lambda t: set_cell(t, "key", 0, "renamed-v0"))
            elif what == "rejects":
                (out / "_batchgen/rejects").mkdir(exist_ok=True)
                (out / "_batchgen/rejects/00000.parquet").write_bytes(b"x")
            a = ctx.cli("verify", out, "--repair", heavy=True, timeout=180)
            told = "remove their markers (_batchgen/shards/00000.json" in a.text
            if what == "tamper" and a.rc == 4 and told:  # the plan may be what is wrong
                (out / "_batchgen/shards/00000.json").unlink()
            b = ctx.cli("resume", out)
            v = ctx.cli("verify", out)
            same = {x["key"]: x["sha256"] for x in rows_of(out)} == first
            g = (
                not a.tb
                and not b.tb
                and same
                and (v.rc == 0 or (what in ("extra", "rejects") and v.rc == 4))
            )
            good &= g
            seen.append(
                f"{fmt} {what}: {a.rc}/{b.rc}/"
                f"{v.rc}{'' if same else ' BYTES DIFFER'}{' TB' if a.tb or b.tb else ''}"
            )
    r["new-B12-repair-many"] = (good, "; ".join(seen))


def repair_while_busy(ctx: Ctx, r: dict[str, Any]) -> None:
    src = ctx.prompts(400)
    out = ctx.dir / "busy"
    with slot():
        p = ctx.start(
            "run",
            "--input",
            src,
            "--output",
            out,
            "--steps",
            8,
            "--samples-per-shard",
            8,
            "--set",
            "resources.generate.max_replicas=1",
        )
        wait_until(
            lambda: len(markers_of(out)) >= 3 if (out / "_batchgen/shards").exists() else False,
            300,
            p,
        )
        before = len(markers_of(out))
        data_file(out).write_bytes(b"x")
        a = ctx.cli("verify", out, "--repair", heavy=False, timeout=60)
        living = p.poll() is None
        after = len(markers_of(out))
        p.send_signal(signal.SIGINT)
        with contextlib.suppress(Exception):
            p.wait(60)
    out = ctx.base(name="gone")
    data_file(out).unlink()
    j = out / "_batchgen/job.yaml"
    t = j.read_text().replace(str(ctx.base_input), str(ctx.dir / "vanished.parquet"))
    j.write_text(t)
    b = ctx.cli("verify", out, "--repair", heavy=True, timeout=120)
    r["new-B12-repair-busy"] = (
        a.rc in (1, 4) and not a.tb and after >= before and living and not b.tb,
        (
            f"busy: rc {a.rc}, markers {before} -> {after}, run lives {living}; "
            f"{a.msg(120)}; input gone: rc {b.rc} {b.msg(120)}"
        ),
    )


@attack(
    "B11",
    "",
    {
        "B11-resume": "resume over a changed byte: traceback",
        "B12-missing": "file deleted: status rc 0, resume rc 0 '500 images'",
        "B12-repair": (
            "verify --repair (and resume --verify) withdraws and makes the damaged shards again"
        ),
        "new-B12-repair-many": (
            "repair of: two damaged shards, a missing rejects file, an extra file in "
            "data/, tampered key with marker fitted, in three formats; then equal bytes to "
            "before"
        ),
        "new-B12-repair-busy": (
            "verify --repair while a run is at work, and of an output whose input has gone"
        ),
    },
)
def b11(ctx: Ctx) -> Result:
    r = {}

    def hurt(out: Path) -> None:
        d = data_file(out)
        b = bytearray(d.read_bytes())
        b[len(b) // 3] ^= 0xFF
        d.write_bytes(b)

    out = ctx.base(name="a")
    hurt(out)
    v = ctx.cli("verify", out)
    o = ctx.cli("resume", out)
    rn = ctx.cli("status", out)
    r["B11-resume"] = (
        v.rc == 4 and not o.tb and (o.rc in (3, 4) or "batchgen verify" in o.text),
        (
            f"verify {v.rc}, resume rc {o.rc}{' TRACEBACK' if o.tb else ''}, status rc "
            f"{rn.rc}; {o.msg(170)}"
        ),
    )
    one_missing(ctx, hurt, r)
    many_repairs(ctx, r)
    repair_while_busy(ctx, r)
    return r
