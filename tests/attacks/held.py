"""Section 9: kills, full disks, second runs and signals, which held and must hold."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file
from tests.attacks.kit import BROKEN, PY, Result, attack, slot
from tests.attacks.processes import alive, descendants, wait_until
from tests.attacks.readers import markers_of, oracle, pixels, rejects_of, rows_of


def planned_keys(
    out: Path,
) -> Any:  # unique ids of the input -> keys are made of row keys and -v<variant>
    return None


def same(a: Path, b: Path) -> str:
    """Pixels by (key) equal, rejects equal."""
    x = {r["key"]: pixels(r["_bytes"]) for r in rows_of(a)}
    y = {r["key"]: pixels(r["_bytes"]) for r in rows_of(b)}
    rx = sorted((r["key"], r["reason"]) for r in rejects_of(a))
    ry = sorted((r["key"], r["reason"]) for r in rejects_of(b))
    if set(x) != set(y):
        return f"{len(set(y) - set(x))} missing, {len(set(x) - set(y))} extra"
    d = [k for k in x if x[k] != y[k]]
    return f"{len(d)} pixels differ" if d else ("rejects differ" if rx != ry else "")


def markers_in(out: Path) -> list[Path]:
    return list((out / "_batchgen/shards").glob("*.json"))


def undisturbed(
    ctx: Ctx, at: Any, early: Any, flags: Any, killed: Any, n: Any, n_kills: Any, out: Path
) -> Result:
    """The output against that of a run that nobody killed."""
    o = ctx.cli("resume", out, timeout=300)
    v = ctx.cli("verify", out)
    ref = ctx.dir / "ref"
    ctx.cli(
        "run",
        *[str(f).replace("samples_per_shard", "samples_per_shard") for f in flags],
        "--output",
        ref,
        timeout=300,
    )
    diff = same(out, ref) or oracle(out)
    total = len(rows_of(out)) + len(rejects_of(out))
    good = killed >= min(n_kills, 3) and o.rc == 0 and v.rc == 0 and not diff and total == n
    return (
        good,
        (
            f"{killed} kills at markers {at} ({early} more before the first commit), last "
            f"resume rc {o.rc}, verify {v.rc}, {len(rows_of(out))} + {len(rejects_of(out))} "
            f"= {total} of {n}, against undisturbed: {diff or 'equal'}; "
            f"{o.msg(80) if o.rc else ''}"
        ),
    )


def kills(ctx: Ctx, fmt: str, n_kills: Any, seed: Any) -> Any:
    n = 1400
    rng = random.Random(seed)
    src = ctx.table(
        "p.parquet",
        {
            "prompt": pa.array(
                [None if i % 37 == 5 else f"a red circle {i}" for i in range(n)], pa.string()
            ),
            "label": [("a", "b", "CON")[i % 3] for i in range(n)],
            "steps": pa.array([1 + i % 2 for i in range(n)]),
        },
    )
    flags = [
        "--input",
        src,
        "--label-column",
        "label",
        "--samples-per-shard",
        4,
        "--steps",
        1,
        "--set",
        f"output.format={fmt}",
        "--set",
        "input.columns.num_inference_steps=steps",
        "--set",
        "policy.rejected_limit=0.5",
        "--set",
        "resources.generate.max_replicas=1",
        "--set",
        "policy.failed_limit=0.5",
    ]
    out = ctx.dir / "out"
    killed, early, at = 0, 0, []
    while killed < n_kills and early < n_kills + 4:
        before = len(markers_in(out))
        with slot():
            args = (
                ["run", *flags, "--output", out]
                if (killed + early) % 2 == 0 or before == 0
                else ["resume", out]
            )
            p = ctx.start(*args)
            got = wait_until(lambda before=before: len(markers_in(out)) > before, 300, p, 0.005)
            if got:
                end = time.monotonic() + rng.uniform(0, 1.6)
                while time.monotonic() < end:
                    time.sleep(0.001)
            if p.poll() is None:
                os.kill(p.pid, signal.SIGKILL)
                p.wait()
                now = len(markers_in(out))
                if now > before:
                    killed += 1
                    at.append(now)
                else:
                    early += 1
            else:
                log = p.log.read_text(errors="replace")
                if p.returncode not in (0, 2):
                    return BROKEN, f"run ended rc {p.returncode}: {log[-200:]}"
                break
        time.sleep(1)
    return undisturbed(ctx, at, early, flags, killed, n, n_kills, out)


for fmt, n, seed in (("parquet", 7, 1), ("webdataset", 7, 2), ("image-folder", 6, 3)):
    attack(
        f"9-kills-{fmt}",
        (
            f"kill -9 of the driver {n} times in mid-commit, {fmt}, rejects, per-row steps, "
            f"run/resume in turn"
        ),
        None,
    )(lambda ctx, f=fmt, n=n, s=seed: kills(ctx, f, n, s))


@attack(
    "9-zombie",
    (
        "driver stopped (SIGSTOP) past its lease, second run, SIGCONT: old one ends, "
        "nothing written twice"
    ),
)
def zombie(ctx: Ctx) -> Result:
    src = ctx.prompts(500)
    out = ctx.dir / "out"
    flags = [
        "--input",
        src,
        "--output",
        out,
        "--samples-per-shard",
        4,
        "--steps",
        8,
        "--set",
        "resources.generate.max_replicas=1",
    ]
    p = ctx.start("run", *flags)
    wait_until(lambda: (out / "_batchgen/shards").exists() and len(markers_of(out)) >= 3, 300, p)
    os.kill(p.pid, signal.SIGSTOP)
    time.sleep(64)
    o_first = len(markers_of(out))
    with slot():
        q = ctx.start("resume", out)
        wait_until(lambda: len(markers_of(out)) > o_first + 2, 240, q)
        stamp = {
            f.name: (f.stat().st_ino, f.stat().st_mtime_ns)
            for f in [*(out / "data").iterdir(), *(out / "_batchgen/shards").iterdir()]
        }
        len(sorted((out / "_batchgen/lease").glob("*.json")))
        os.kill(p.pid, signal.SIGCONT)
        t = time.monotonic()
        try:
            rc = p.wait(60)
        except subprocess.TimeoutExpired:
            rc = None
        secs = time.monotonic() - t
        try:
            rc2 = q.wait(240)
        except subprocess.TimeoutExpired:
            rc2 = None
    twice = [
        n
        for n, s in stamp.items()
        for f in [out / "data" / n, out / "_batchgen/shards" / n]
        if f.exists() and (f.stat().st_ino, f.stat().st_mtime_ns) != s
    ]
    v = ctx.cli("verify", out)
    log = p.log.read_text(errors="replace")
    qlog = q.log.read_text(errors="replace")
    msg = next((line for line in log.splitlines() if line.startswith("batchgen:")), log[-80:])
    qm = next((line for line in qlog.splitlines() if line.startswith("batchgen:")), "")
    return (
        rc == 3
        and rc2 == 0
        and not twice
        and v.rc == 0
        and not oracle(out)
        and "Traceback" not in log,
        (
            f"old ended rc {rc} after {secs:.0f} s ({msg[:110]}), second rc {rc2} "
            f"({qm[:90]}), written twice: {twice[:3]}, verify {v.rc}, oracle "
            f"{oracle(out) or 'ok'}, {len(rows_of(out))} of 500"
        ),
    )


@attack("9-disk-full", "disk full on tmpfs -> rc 3, no rubbish, resume ok")
def full(ctx: Ctx) -> Result:
    src = ctx.prompts(400)
    m = ctx.dir / "small"
    m.mkdir()
    script = f"""
mount -t tmpfs -o size=1000k,nr_inodes=4000 tmpfs {m}
{PY} -m batchgen run --input {src} --output {m}/out --samples-per-shard 8 --steps 1 \\
  --set resources.generate.max_replicas=1 > {ctx.dir}/one.txt 2>&1; echo "rc1 $?"
find {m}/out -name '*tmp*' -type f | wc -l
mount -o remount,size=60m {m}
{PY} -m batchgen resume {m}/out > {ctx.dir}/two.txt 2>&1; echo "rc2 $?"
{PY} -m batchgen verify {m}/out > {ctx.dir}/three.txt 2>&1; echo "rc3 $?"
cp -r {m}/out {ctx.dir}/copy
umount {m}
"""
    o = ctx.exec(["unshare", "-m", "bash", "-c", script], heavy=True, timeout=300)
    one = (ctx.dir / "one.txt").read_text(errors="replace")
    w = o.out.split()
    msg = next((line for line in one.splitlines() if line.startswith("batchgen:")), one[-120:])
    n = len(rows_of(ctx.dir / "copy")) if (ctx.dir / "copy").exists() else 0
    return (
        w[:2] == ["rc1", "3"]
        and "rc2 0" in o.out
        and "rc3 0" in o.out
        and n == 400
        and "Traceback" not in one
        and not oracle(ctx.dir / "copy"),
        f"{' '.join(w)}; {n} of 400; {msg[:200]}",
    )


@attack("9-two-runs", "two runs at one instant: one refused, named")
def two(ctx: Ctx) -> Result:
    src = ctx.prompts(64)
    out = ctx.dir / "out"
    with slot():
        ps = [
            ctx.start(
                "run",
                "--input",
                src,
                "--output",
                out,
                "--steps",
                4,
                "--samples-per-shard",
                8,
                log=f"r{i}.txt",
            )
            for i in range(3)
        ]
        rcs = []
        for p in ps:
            try:
                rcs.append(p.wait(200))
            except subprocess.TimeoutExpired:
                rcs.append(None)
    logs = [p.log.read_text(errors="replace") for p in ps]
    msgs = [
        next((line for line in t.splitlines() if line.startswith("batchgen:")), "")[:120]
        for t in logs
    ]
    v = ctx.cli("verify", out)
    return sorted(map(str, rcs)) == ["0", "1", "1"] and v.rc == 0 and not oracle(out) and not any(
        "Traceback" in t for t in logs
    ), f"three runs: rcs {rcs}, verify {v.rc}; {[m for m in msgs if m][:1]}"


@attack(
    "9-signals",
    "",
    {
        "9-sigint": "SIGINT ends in seconds, rc 3, resumable, nothing left",
        "9-sigterm": "SIGTERM likewise",
        "9-ulimit": "ulimit -n 256",
        "9-readonly-data": "read-only data/ (as root without DAC override)",
    },
)
def signals(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(800)
    for name, num in (("sigint", signal.SIGINT), ("sigterm", signal.SIGTERM)):
        out = ctx.dir / name
        with slot():
            p = ctx.start(
                "run", "--input", src, "--output", out, "--steps", 8, "--samples-per-shard", 8
            )
            wait_until(lambda out=out: len(markers_of(out)) >= 2, 300, p)
            pids = set(descendants(p.pid))
            t = time.monotonic()
            p.send_signal(num)
            try:
                rc = p.wait(60)
            except subprocess.TimeoutExpired:
                rc = None
            secs = time.monotonic() - t
            time.sleep(3)
            left = [q for q in pids if alive(q)]
        log = p.log.read_text(errors="replace")
        tmp = [f for f in out.rglob("*") if f.is_file() and "tmp" in f.relative_to(out).parts]
        r[f"9-{name}"] = (
            rc == 3 and secs < 30 and "Traceback" not in log and "resume" in log and not left,
            f"rc {rc} in {secs:.0f} s, {len(left)} processes left, tmp files {len(tmp)}",
        )
    small = ctx.prompts(64, name="s.parquet")
    o = ctx.exec(
        [
            "bash",
            "-c",
            (
                f"ulimit -n 256; {PY} -m batchgen run --input {small} --output {ctx.dir}/ul "
                f"--steps 1 --samples-per-shard 4"
            ),
        ],
        heavy=True,
        timeout=200,
    )
    v = ctx.cli("verify", ctx.dir / "ul")
    r["9-ulimit"] = (
        o.rc == 0 and v.rc == 0,
        f"rc {o.rc}, verify {v.rc} {o.msg(120) if o.rc else ''}",
    )
    out = ctx.dir / "rod"
    ctx.cli("run", "--input", small, "--output", out, "--steps", 1, "--samples-per-shard", 32)
    drop = out / "_batchgen/shards/00001.json"
    drop.unlink()
    data_file(out, 1).unlink()
    os.chmod(out / "data", 0o555)
    o = ctx.exec(
        [PY, "-m", "batchgen", "resume", out],
        heavy=True,
        timeout=200,
        prefix=("setpriv", "--bounding-set=-dac_override,-dac_read_search"),
    )
    os.chmod(out / "data", 0o755)
    o2 = ctx.cli("resume", out)
    v = ctx.cli("verify", out)
    r["9-readonly-data"] = (
        o.rc == 3 and not o.tb and o2.rc == 0 and v.rc == 0,
        f"rc {o.rc} {o.msg(140)}; then resume {o2.rc}, verify {v.rc}",
    )
    return r
