"""Section 2: lost plans, copied shards, links, inputs that change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file
from tests.attacks.kit import HELD, OTHER, Result, attack, ok_err, slot
from tests.attacks.processes import wait_until
from tests.attacks.readers import rows_of


def run_small(ctx: Ctx, src: Path, out: Path, *more: Any, **kw: Any) -> Any:
    return ctx.cli(
        "run", "--input", src, "--output", out, "--steps", 1, "--samples-per-shard", 4, *more, **kw
    )


@attack("2.1a", "plan.json lost, run with another seed adopts the old markers")
def a21a(ctx: Ctx) -> Result:
    out = ctx.base()
    old = {r["key"]: r["sha256"] for r in rows_of(out)}
    (out / "_batchgen/plan.json").unlink()
    o = run_small(ctx, ctx.base_input, out, "--label-column", "label", "--seed", 99)
    now = {r["key"]: r["sha256"] for r in rows_of(out)}
    adopted = sum(old[k] == now.get(k) for k in old)
    refused = o.rc not in (0, None) and not o.tb
    return (
        refused or (o.rc == 0 and adopted == 0)
    ), f"rc {o.rc}, {adopted} of 8 images are of the old seed; {o.msg()}"


@attack("2.1b", "plan.json lost, other input at the same path and row count")
def a21b(ctx: Ctx) -> Result:
    src = ctx.prompts(8, word="circle")
    out = ctx.dir / "out"
    o1 = run_small(ctx, src, out)
    (out / "_batchgen/plan.json").unlink()
    ctx.prompts(8, word="square")
    o = run_small(ctx, src, out)
    v = ctx.cli("verify", out)
    wrong = sum("circle" in r["prompt"] for r in rows_of(out))
    silent = o.rc == 0 and wrong
    return not silent and not o.tb and not (
        v.rc == 0 and wrong
    ), f"first {o1.rc}; rc {o.rc}, verify {v.rc}, {wrong} of 8 rows have the old prompts; {o.msg()}"


@attack(
    "2.1c",
    "",
    {
        "2.1c-copied-shard": (
            "shard 0 (data and marker) copied from another output of the same spec but other input"
        ),
        "2.1d-plan-edited": (
            "plan.json edited (seed, an input's etag) with its fingerprints left: "
            "status/verify/resume"
        ),
    },
)
def a21c(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(8, word="circle")
    run_small(ctx, src, ctx.dir / "one")
    os.utime(src)
    ctx.prompts(8, word="square")
    run_small(ctx, src, ctx.dir / "two")
    for name in ("data/" + data_file(ctx.dir / "one").name, "_batchgen/shards/00000.json"):
        shutil.copy(ctx.dir / "one" / name, ctx.dir / "two" / name)
    v = ctx.cli("verify", ctx.dir / "two")
    q = ctx.cli("verify", "--quick", ctx.dir / "two")
    s = ctx.cli("resume", ctx.dir / "two")
    r["2.1c-copied-shard"] = (
        v.rc == 4 and q.rc == 4,
        (
            f"verify {v.rc}, --quick {q.rc}, resume {s.rc}; "
            f"{v.text.splitlines()[0][:200] if v.text else ''}"
        ),
    )
    seen, good = [], True
    for what, edit in {
        "seed": lambda p: p["spec"].__setitem__("seed", 5),
        "etag": lambda p: p["files"][0].__setitem__("etag", "1.0"),
        "rows": lambda p: p["files"][0].__setitem__("row_groups", [4, 4]),
        "model": lambda p: p["model"].__setitem__("manifest_sha256", "0" * 64),
    }.items():
        out = ctx.base(name=f"e-{what}")
        f = out / "_batchgen/plan.json"
        p = json.loads(f.read_text())
        edit(p)
        f.write_text(json.dumps(p, indent=1))
        v = ctx.cli("verify", out)
        s = ctx.cli("status", out)
        fine = v.rc != 0 and not v.tb
        good &= fine
        seen.append(f"{what}: verify {v.rc} status {s.rc}")
    r["2.1d-plan-edited"] = (good, "; ".join(seen))
    return r


@attack(
    "2.2",
    "",
    {
        "2.2-link-file": "a symlinked Parquet file in a folder or glob is left out in silence",
        "2.2-link-folder": "a linked sub-folder is not searched; a folder of links only",
        "2.2-upper": "A.PARQUET is left out in silence",
        "new-2.2-loop": (
            "a link loop, a dangling link, and a link out of the folder: told or followed, "
            "ends within 20 s"
        ),
        "new-2.2-hf-cache": "a Hugging Face cache snapshot (all links to ../../blobs/HASH)",
    },
)
def a22(ctx: Ctx) -> Result:
    r = {}
    t = pa.table({"prompt": [f"p {i}" for i in range(64)]})
    (ctx.dir / "lin").mkdir()
    (ctx.dir / "blobs").mkdir()
    pq.write_table(t, ctx.dir / "lin/a.parquet")
    pq.write_table(t, ctx.dir / "blobs/b")
    (ctx.dir / "lin/b.parquet").symlink_to("../blobs/b")

    def rows(inp: Any) -> Any:
        o = ctx.cli("plan", "--input", inp, "--output", ctx.dir / "o", "--json")
        try:
            return json.loads(o.out)["rows"], o
        except Exception:
            return None, o

    def judge(inp: Any, want: Any, name: str) -> Any:
        n, o = rows(inp)
        refused = n is None and ok_err(o) and name in o.text
        return (n == want or refused), f"{n if n is not None else 'refused: ' + o.msg(120)}"

    a, sa = judge(ctx.dir / "lin", 128, "b.parquet")
    b, sb = judge(str(ctx.dir / "lin") + "/*.parquet", 128, "b.parquet")
    r["2.2-link-file"] = (a and b, f"folder {sa}, glob {sb} (128 expected)")
    (ctx.dir / "f1").mkdir()
    (ctx.dir / "real").mkdir()
    pq.write_table(t, ctx.dir / "real/x.parquet")
    pq.write_table(t, ctx.dir / "f1/a.parquet")
    (ctx.dir / "f1/sub").symlink_to("../real")
    (ctx.dir / "only").mkdir()
    (ctx.dir / "only/y.parquet").symlink_to("../real/x.parquet")
    a, sa = judge(ctx.dir / "f1", 128, "sub")
    b, sb = judge(ctx.dir / "only", 64, "y.parquet")
    r["2.2-link-folder"] = (a and b, f"linked folder {sa} (128), links only {sb} (64)")
    (ctx.dir / "up").mkdir()
    pq.write_table(t, ctx.dir / "up/A.PARQUET")
    pq.write_table(t, ctx.dir / "up/b.parquet")
    a, sa = judge(ctx.dir / "up", 128, "A.PARQUET")
    b, sb = judge(ctx.dir / "up/A.PARQUET", 64, "A.PARQUET")
    r["2.2-upper"] = (a and b, f"folder {sa} (128), by name {sb} (64)")
    (ctx.dir / "loop").mkdir()
    pq.write_table(t, ctx.dir / "loop/a.parquet")
    (ctx.dir / "loop/self").symlink_to(".")
    (ctx.dir / "loop/d.parquet").symlink_to("nowhere")
    n, o = rows(ctx.dir / "loop")
    r["new-2.2-loop"] = (
        not o.timed_out
        and not o.tb
        and (n is None and o.rc == 1 and ("d.parquet" in o.text or "self" in o.text)),
        f"{n} {o.msg()}",
    )
    (ctx.dir / "loop/d.parquet").unlink()
    n, o = rows(ctx.dir / "loop")
    r["new-2.2-loop"] = (
        r["new-2.2-loop"][0] and not o.timed_out and not o.tb and n in (64, None),
        r["new-2.2-loop"][1] + f"; without the dangling one: {n} {o.msg() if n is None else ''}",
    )
    snap = ctx.dir / "hub/datasets--x--y/snapshots/abc/data"
    blobs = ctx.dir / "hub/datasets--x--y/blobs"
    snap.mkdir(parents=True)
    blobs.mkdir()
    for i in range(3):
        pq.write_table(t, blobs / f"{i:040x}")
        (snap / f"train-{i}.parquet").symlink_to(f"../../../blobs/{i:040x}")
    a, sa = judge(snap.parent, 192, "train-0.parquet")
    r["new-2.2-hf-cache"] = (a, f"{sa} (192 expected)")
    return r


@attack(
    "2.3",
    "",
    {
        "2.3-replaced": (
            "a local input replaced by a file of equal size after planning is used (CLI: "
            "swapped between plan and reading)"
        ),
        "new-2.3-inplace": (
            "the same, rewritten in place with its old mtime put back (undetectable by "
            "stat: seen only)"
        ),
    },
)
def a23(ctx: Ctx) -> Result:
    r = {}

    def go(how: Any) -> Any:
        src = ctx.prompts(8, name=f"{how}.parquet", word="circle")
        other = ctx.prompts(8, name=f"{how}2.parquet", word="planet")
        other.write_bytes(other.read_bytes())
        same = src.stat().st_size == other.stat().st_size
        st = src.stat()
        out = ctx.dir / f"out-{how}"
        with slot():
            p = ctx.start(
                "run", "--input", src, "--output", out, "--steps", 1, "--samples-per-shard", 4
            )
            wait_until(lambda: (out / "_batchgen/plan.json").exists(), 60, p, 0.01)
            if how == "swap":
                os.replace(other, src)
            else:
                with open(src, "r+b") as f:
                    f.write(other.read_bytes())
                os.utime(src, ns=(st.st_atime_ns, st.st_mtime_ns))
            rc = p.wait(180)
        wrong = sum("planet" in x["prompt"] for x in rows_of(out))
        log = p.log.read_text(errors="replace")
        v = ctx.cli("verify", out)
        return same, rc, wrong, v, log

    same, rc, wrong, v, log = go("swap")
    tail = next(
        (line for line in log.splitlines() if line.startswith("batchgen:")),
        log.strip().splitlines()[-1] if log.strip() else "",
    )
    r["2.3-replaced"] = (
        not wrong and rc != 0 and "Traceback" not in log,
        (
            f"equal size {same}; rc {rc}, {wrong} of 8 rows from the other file, verify "
            f"{v.rc}; {tail[:180]}"
        ),
    )
    same, rc, wrong, v, log = go("inplace")
    r["new-2.3-inplace"] = (
        OTHER if wrong else HELD,
        f"rc {rc}, {wrong} rows from the other file, verify {v.rc}",
    )
    return r
