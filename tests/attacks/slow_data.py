"""Section 2: slow servers, changed fingerprints and what else loses data in silence."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file, i2i, png, send
from tests.attacks.kit import Result, attack
from tests.attacks.readers import reasons_of, rows_of, tree_of


def trickle(h: Any, seconds: int = 60, ok: bytes = b"") -> None:
    h.send_response(200)
    h.send_header("Content-Type", "image/png")
    h.send_header("Content-Length", "100000")
    h.end_headers()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        h.wfile.write(b"x")
        h.wfile.flush()
        time.sleep(0.3)


def watched(ctx: Ctx, base: str, r: dict[str, Any]) -> None:
    src = ctx.table(
        "j.parquet",
        {
            "prompt": ["x"] * 20,
            "image": [f"{base}/slow{i}.png" for i in range(12)]
            + [f"{base}/good{i}.png" for i in range(8)],
        },
    )
    out = ctx.dir / "o2"
    o = ctx.cli(
        "run",
        "--task",
        "image-to-image",
        "--input",
        src,
        "--image-column",
        "image",
        "--output",
        out,
        "--steps",
        2,
        "--samples-per-shard",
        20,
        "--set",
        f"input.uri_roots=[{base}]",
        "--set",
        "input.uri_timeout_s=3",
        "--set",
        "resources.generate.stuck_after_s=12",
        "--set",
        "policy.rejected_limit=1",
        "--set",
        "resources.generate.max_replicas=1",
        timeout=300,
    )
    acc = len(rows_of(out))
    r["2.4-watch"] = (
        acc == 8 and o.rc == 0,
        (
            f"rc {o.rc}, accepted {acc} of 8 good, {reasons_of(out)}, {o.secs:.0f} "
            f"s{' TIMED OUT' if o.timed_out else ''}; {o.msg(160)}"
        ),
    )


def hanging(ctx: Ctx, base: str, r: dict[str, Any]) -> None:
    kinds = ["never", "drip", "loop", "slow"]
    src = ctx.table(
        "k.parquet",
        {
            "prompt": ["x"] * 16,
            "image": [f"{base}/{k}{i}.png" for i in range(2) for k in kinds]
            + [f"{base}/good{i}.png" for i in range(8)],
        },
    )
    out = ctx.dir / "o3"
    got = ctx.inproc(
        i2i(src, out, input__uri_roots=[base], input__uri_timeout_s=2, output__samples_per_shard=8),
        timeout=150,
    )[0]
    acc = len(rows_of(out))
    t = ctx.last_out.secs
    r["new-2.4-hang"] = (
        acc == 8 and sum(reasons_of(out).values()) == 8,
        f"accepted {acc} of 8 good, {reasons_of(out)}, {t:.0f} s {got.get('error', '')[:150]}",
    )


@attack(
    "2.4",
    "",
    {
        "2.4-neighbours": (
            "8 trickling URLs, then 8 good ones, uri_timeout_s=2 (in-process): the good "
            "rows are rejected"
        ),
        "2.4-watch": (
            "12 slow of 20 URLs, uri_timeout 3 s, stuck_after 12 s (CLI): shard killed and "
            "failed with its good rows"
        ),
        "new-2.4-hang": (
            "servers that accept and never answer, that drip headers, and a redirect loop, "
            "among good rows"
        ),
    },
)
def a24(ctx: Ctx) -> Result:
    r = {}
    body = png()

    def h(q: Any) -> None:
        if "slow" in q.path:
            trickle(q, 40)
        elif "never" in q.path:
            time.sleep(40)
        elif "drip" in q.path:
            q.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for i in range(100):
                q.wfile.write(f"X-{i}: 1\r\n".encode())
                q.wfile.flush()
                time.sleep(0.4)
        elif "loop" in q.path:
            send(q, b"", 302, Location=f"{base}/loop{time.monotonic_ns()}.png")
        else:
            send(q, body)

    base, seen = ctx.serve(h)
    src = ctx.table(
        "i.parquet",
        {
            "prompt": ["x"] * 16,
            "image": [f"{base}/slow{i}.png" for i in range(8)]
            + [f"{base}/good{i}.png" for i in range(8)],
        },
    )
    out = ctx.dir / "o1"
    t = time.monotonic()
    got = ctx.inproc(
        i2i(
            src, out, input__uri_roots=[base], input__uri_timeout_s=2, output__samples_per_shard=16
        ),
        timeout=150,
    )[0]
    asked = sum("good" in s for s in seen)
    acc = len(rows_of(out))
    r["2.4-neighbours"] = (
        acc == 8 and reasons_of(out).get("uri-timeout") == 8,
        (
            f"accepted {acc} of 8 good, {reasons_of(out)}, good ones asked for: {asked}, "
            f"{time.monotonic() - t:.0f} s {got.get('error', '')[:150]}"
        ),
    )
    watched(ctx, base, r)
    hanging(ctx, base, r)
    return r


@attack(
    "2.5",
    (
        "a late worker's worse result replaces a committed shard (in-process, its web "
        "server now answers 503)"
    ),
)
def a25(ctx: Ctx) -> Result:
    state = {"ok": True}
    body = png()
    base, _seen = ctx.serve(lambda q: send(q, body) if state["ok"] else send(q, b"no", 404))
    src = ctx.table(
        "i.parquet", {"prompt": ["x"] * 8, "image": [f"{base}/{i}.png" for i in range(8)]}
    )
    out = ctx.dir / "out"
    sp = i2i(src, out, input__uri_roots=[base], output__samples_per_shard=8, storage__patience_s=1)
    ctx.inproc(sp)
    first = tree_of(out)
    n1 = len(rows_of(out))
    state["ok"] = False
    (b,) = ctx.inproc(sp)
    n2 = len(rows_of(out))
    data = {k: v for k, v in first.items() if k.startswith("data/") or "shards/" in k}
    now = tree_of(out)
    changed = [k for k in data if now.get(k) != data[k]]
    v = ctx.cli("verify", out)
    return (
        n1 == 8 and n2 == 8 and not changed and v.rc == 0,
        f"accepted {n1} then {n2}; changed {changed}; verify {v.rc}; {b.get('error', '')[:120]}",
    )


def refinger(tree: Any, fn: Any) -> None:
    for k, v in list(tree.items()):
        if isinstance(v, str) and "fingerprint" in k:
            tree[k] = fn(v)


@attack(
    "2.6",
    "",
    {
        "2.6-foreign": "export of an output with a marker of another spec launders it",
        "2.6-copy": "marker 0 := copy of marker 1, exported",
        "new-2.6-damaged": (
            "export of an output with a changed byte in data, with a missing file, with a "
            "pending shard"
        ),
    },
)
def a26(ctx: Ctx) -> Result:
    r = {}
    out = ctx.base()
    f = out / "_batchgen/shards/00000.json"
    m = json.loads(f.read_text())
    refinger(m, lambda v: "0" * len(v))
    f.write_text(json.dumps(m))
    v = ctx.cli("verify", out)
    e = ctx.cli("export", out, ctx.dir / "t1", "--format", "webdataset")
    v2 = ctx.cli("verify", ctx.dir / "t1")
    r["2.6-foreign"] = (
        v.rc == 4 and e.rc != 0 and not e.tb and v2.rc != 0,
        f"verify source {v.rc}, export {e.rc}, verify target {v2.rc}; {e.msg()}",
    )
    out = ctx.base(name="out2")
    shutil.copy(out / "_batchgen/shards/00001.json", out / "_batchgen/shards/00000.json")
    e = ctx.cli("export", out, ctx.dir / "t2", "--format", "webdataset")
    r["2.6-copy"] = (
        e.rc != 0
        and not e.tb
        and ("0" in e.text and "shard" in e.text.lower())
        and "2 shards written" not in e.text,
        f"export {e.rc}; {e.text.strip()[:250]}",
    )
    seen, good = [], True
    for k in ("byte", "missing", "pending"):
        out = ctx.base(name=f"d-{k}")
        d = data_file(out)
        if k == "byte":
            b = bytearray(d.read_bytes())
            b[len(b) // 3] ^= 1
            d.write_bytes(b)
        elif k == "missing":
            d.unlink()
        else:
            d.unlink()
            (out / "_batchgen/shards/00000.json").unlink()
        e = ctx.cli("export", out, ctx.dir / f"t-{k}", "--format", "image-folder")
        good &= e.rc != 0 and not e.tb
        seen.append(f"{k}: rc {e.rc}{' TRACEBACK' if e.tb else ''} {e.msg(90)}")
    r["new-2.6-damaged"] = (good, "; ".join(seen))
    return r
