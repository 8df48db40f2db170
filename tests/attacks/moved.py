"""Section 7: clocks, renamed, copied and moved outputs."""

from __future__ import annotations

import contextlib
import glob
import json
import shutil
import signal
import subprocess
import time
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.kit import Result, attack, slot
from tests.attacks.processes import kill_group, wait_until
from tests.attacks.records import drop_shard


def ahead(seconds: float) -> dict[str, str]:
    """An environment in which the clock is ahead, but not that by which waiting is measured."""
    (library,) = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")  # apt: faketime
    quiet = {"DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return {"LD_PRELOAD": library, "FAKETIME": f"{seconds:+.0f}s", **quiet}


@attack(
    "7-renamed",
    "",
    {
        "7-renamed": (
            "output folder renamed while a run works: it goes on to the end in a folder "
            "without a plan"
        ),
        "new-7-deleted": "output folder deleted (rm -r) while a run works",
        "new-7-plan-gone": "only plan.json, or only the lease folder, is deleted in mid-run",
    },
)
def a7r(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(1600)

    def go(name: str, act: Any, check: Any = None) -> Any:
        out = ctx.dir / name
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
            wait_until(lambda: len(list((out / "_batchgen/shards").glob("*.json"))) >= 2, 300, p)
            act(out)
            t = time.monotonic()
            try:
                rc = p.wait(75)
            except subprocess.TimeoutExpired:
                rc = None
            secs = time.monotonic() - t
            n = len(list((out / "_batchgen/shards").glob("*.json"))) if out.exists() else 0
            if rc is None:
                kill_group(p)
        log = p.log.read_text(errors="replace")
        msg = next((line for line in log.splitlines() if line.startswith("batchgen:")), "")
        wrong = (
            "continue with `batchgen resume" in msg and not (out / "_batchgen/plan.json").exists()
        )
        how = "still at work after 75 s" if rc is None else f"ended rc {rc} after {secs:.0f} s"
        return (
            rc not in (None, 0) and n < 120 and "Traceback" not in log and bool(msg),
            (
                f"{how}, {n} markers of 200 made "
                f"there{', advice that cannot work' if wrong else ''}; {msg[:220]}"
            ),
        )

    r["7-renamed"] = go("o1", lambda o: o.rename(ctx.dir / "moved"))
    r["new-7-deleted"] = go("o2", lambda o: shutil.rmtree(o, ignore_errors=True))
    a = go("o3", lambda o: (o / "_batchgen/plan.json").unlink())
    b = go("o4", lambda o: shutil.rmtree(o / "_batchgen/lease", ignore_errors=True))
    r["new-7-plan-gone"] = (a[0] and b[0], f"plan: {a[1]} || lease: {b[1]}")
    return r


@attack(
    "7-clock",
    "",
    {
        "7-clock-ahead": "a clock 10 min ahead takes a living run's lease",
        "7-far-lease": "a lease dated 10 years ahead locks the output, no way out named",
        "new-7-clock-behind": (
            "a second run whose clock is 10 min behind: the lease looks dated ahead"
        ),
    },
)
def a7c(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(800)

    def two(env_a: Any, env_b: Any, name: str) -> Any:
        out = ctx.dir / name
        with slot():
            a = ctx.start(
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
                env=env_a,
            )
            wait_until(lambda: len(list((out / "_batchgen/shards").glob("*.json"))) >= 1, 300, a)
            b = ctx.cli("resume", out, env=env_b, heavy=False, timeout=60)
            time.sleep(12)
            living = a.poll() is None
            if living:
                a.send_signal(signal.SIGINT)
            with contextlib.suppress(Exception):
                a.wait(60)
        log = a.log.read_text(errors="replace")
        told = next((line for line in log.splitlines() if line.startswith("batchgen:")), "")
        return (
            living and b.rc == 1 and not b.timed_out and not b.tb,
            (
                f"second: rc {'-' if b.timed_out else b.rc} {b.msg(150)}; first "
                f"{'lives' if living else 'ENDED: ' + told[:120]}"
            ),
        )

    env = ahead(600)
    r["7-clock-ahead"] = two({}, env, "o1")
    r["new-7-clock-behind"] = two({}, ahead(-600), "o2")  # Ray does not start by such a clock
    out = ctx.base()
    f = sorted((out / "_batchgen/lease").glob("*.json"))[-1]
    j = json.loads(f.read_text())
    j |= {
        "owner": "otherhost 123 aaaa-1 55 abcd",
        "renewed_at": time.time() + 3e8,
        "released": False,
    }
    f.write_text(json.dumps(j))
    o = ctx.cli("resume", out)
    named = any(
        w in o.text
        for w in (
            f.name,
            "lease/",
            "--take",
            "--break",
            "--steal",
            "clock",
            "--overwrite",
            "unlock",
        )
    )
    r["7-far-lease"] = (
        o.rc == 0 or (o.rc == 1 and named and "300000" not in o.text and not o.tb),
        f"rc {o.rc}; {o.msg(300)}",
    )
    return r


@attack(
    "7-small",
    "",
    {
        "7-copied": "a copied/moved output: status, verify, resume name the OLD place",
        "7-renamed-marker": (
            "marker renamed 0.json: status and run say pending, resume makes nothing"
        ),
        "7-chain": "--output /x/a::b and a::c write to /x/a; s3://b/a::b TypeError",
    },
)
def a7m(ctx: Ctx) -> Result:
    r = {}
    out = ctx.base(name="new-place")
    old = str(ctx.folder / "_base-parquet/out")
    texts = {c: ctx.cli(c, out, heavy=False) for c in ("status", "verify", "resume")}
    wrong = [c for c, o in texts.items() if old in o.text]
    drop_shard(out)
    s = ctx.cli("status", out)
    if old in s.text:
        wrong.append("status pending")
    r["7-copied"] = (
        not wrong and not any(o.tb for o in texts.values()),
        f"name the old place: {wrong}; {s.last[:160]}",
    )
    out = ctx.base(name="ren")
    f = out / "_batchgen/shards/00000.json"
    f.rename(f.with_name("0.json"))
    s = ctx.cli("status", out)
    v = ctx.cli("verify", out)
    o = ctx.cli("resume", out)
    v2 = ctx.cli("verify", out)
    s2 = ctx.cli("status", out)
    fine = (o.rc == 0 and (v2.rc == 0 or "0.json" in v2.text)) or ("0.json" in o.text and o.rc != 0)
    r["7-renamed-marker"] = (
        fine and not o.tb,
        (
            f"status {s.rc}, verify {v.rc}, resume {o.rc}, then verify {v2.rc}, status "
            f"{s2.rc}; {o.msg(100)}; {v2.text.splitlines()[0][:120] if v2.text else ''}"
        ),
    )
    src = ctx.prompts(2)
    a = ctx.cli("run", "--input", src, "--output", f"{ctx.dir}/x/a::b", "--steps", 1)
    at = sorted(p.name for p in (ctx.dir / "x").iterdir()) if (ctx.dir / "x").exists() else []
    b = ctx.cli("status", "s3://b/a::b")
    c = ctx.cli(
        "run", "--input", src, "--output", "s3://b/a::b", "--steps", 1, heavy=False, timeout=60
    )
    r["7-chain"] = (
        (a.rc == 1 or at == ["a::b"]) and not (a.tb or b.tb or c.tb),
        (
            f"local: rc {a.rc}, made {at}; s3: status rc "
            f"{b.rc}{' TRACEBACK' if b.tb else ''}, run rc "
            f"{c.rc}{' TRACEBACK' if c.tb else ''} {c.msg(100)}"
        ),
    )
    return r
