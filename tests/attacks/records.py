"""Section 7: records of a wrong shape or of a future format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file
from tests.attacks.kit import Result, attack

LEASE, MARKER, PLAN = "lease/00001.json", "shards/00000.json", "plan.json"


def shapes(ctx: Ctx, edits: Any, cmds: Any, heavy: bool = False) -> Any:
    """Each edit of a fresh base, each command; (all fine, list of bad)."""
    bad, n = [], 0
    for name, edit in edits.items():
        out = ctx.base(name=f"s-{name}")
        edit(out)
        for cmd in cmds:
            args = [cmd, out] + (
                [ctx.dir / f"t-{name}", "--format", "webdataset"] if cmd == "export" else []
            )
            o = ctx.cli(*args, timeout=180 if cmd == "resume" else 40, heavy=heavy, limit_gb=8)
            n += 1
            if o.tb or o.timed_out or o.rc not in (0, 1, 2, 3, 4) or "MemoryError" in o.text:
                bad.append(f"{cmd} {name}: {'HANG' if o.timed_out else o.last[:60]}")
            elif (
                cmd == "verify"
                and o.rc == 0
                and name.split("-")[0] in ("marker", "plan")
                and "extra" not in name
            ):
                bad.append(f"verify {name}: rc 0")
    return (
        not bad,
        f"{n} commands, {len(bad)} bad: {'; '.join(bad[:6])}"
        if bad
        else f"{n} commands: all in words",
    )


def put(name: str, data: Any) -> Any:
    def e(out: Path) -> None:
        p = out / "_batchgen" / name
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    return e


def change(name: str, fn: Any) -> Any:
    def e(out: Path) -> None:
        p = out / "_batchgen" / name
        j = json.loads(p.read_text())
        fn(j)
        p.write_text(json.dumps(j))

    return e


def drop_shard(out: Path, shard: int = 1) -> None:
    (out / f"_batchgen/shards/{shard:05d}.json").unlink()
    data_file(out, shard).unlink()


def failed_shapes(ctx: Ctx, r: dict[str, Any]) -> None:

    def failed(data: Any) -> Any:
        def e(out: Path) -> None:
            drop_shard(out)
            put("failed/00001.json", data)(out)

        return e

    whole = {
        "shard": 1,
        "planned": 4,
        "error": "E",
        "message": "m",
        "traceback": "",
        "attempts": 1,
        "host": "h",
        "failed_at": 1.0,
    }
    a, s1 = shapes(
        ctx,
        {
            f"failed-{i}": failed(d)
            for i, d in enumerate(
                [
                    {**whole, "new": 1},
                    b"{",
                    [],
                    {},
                    None,
                    {**whole, "planned": "x"},
                    {**whole, "shard": 7},
                    b"[" * 100000,
                    b"\xff",
                ]
            )
        },
        ["status", "verify"],
    )
    out = ctx.base(name="fr")
    failed(b"{")(out)
    o1 = ctx.cli("resume", out)
    out = ctx.base(name="fn")
    failed({**whole, "new": 1})(out)
    o2 = ctx.cli("resume", out)
    b = o1.rc in (0,) and o2.rc == 0 and not o1.tb and not o2.tb
    r["7-failed-shape"] = (
        a and b,
        (
            f"{s1}; resume over truncated: rc {o1.rc} {o1.last[:80] if o1.rc else ''}; over "
            f"a new field: rc {o2.rc} {o2.last[:80] if o2.rc else ''}"
        ),
    )


def marker_shapes(ctx: Ctx, r: dict[str, Any]) -> None:
    edits = {
        f"marker-{i}": change(MARKER, f)
        for i, f in enumerate(
            [
                lambda j: j["counts"].__setitem__("accepted", ""),
                lambda j: j["files"][0].__setitem__("name", 1),
                lambda j: j.__setitem__("files", None),
                lambda j: j.__setitem__("files", [1]),
                lambda j: j.__setitem__("counts", []),
                lambda j: j.__setitem__("shard", "0"),
                lambda j: j["files"][0].__setitem__("rows", "4"),
                lambda j: j["files"][0].__setitem__("bytes", 2**70),
                lambda j: j["files"][0].__setitem__("sha256", None),
                lambda j: j.__setitem__("reasons", 5) or j["counts"].__setitem__("planned", 2**70),
                lambda j: j["counts"].__setitem__("accepted", -4),
                lambda j: j["files"][0].__setitem__("name", ""),
                lambda j: j["files"][0].__setitem__("name", "data/\0x"),
                lambda j: j["files"].append(j["files"][0]),
            ]
        )
    }
    edits |= {
        f"marker-raw{i}": put(MARKER, d)
        for i, d in enumerate([[], {}, None, b"", b"[" * 100000, b"\xff\xfe"])
    }
    edits |= {"extra-marker": change(MARKER, lambda j: j.__setitem__("some_new_field", {"a": 1}))}
    a, s = shapes(ctx, edits, ["verify", "status", "export", "resume"])
    r["7-marker-shape"] = (a, s)


def plan_shapes(ctx: Ctx, r: dict[str, Any]) -> None:
    edits = {
        f"plan-{i}": change(PLAN, f)
        for i, f in enumerate(
            [
                lambda j: j.__setitem__("model", None),
                lambda j: j.__setitem__("rows", "x"),
                lambda j: j["files"][0].__setitem__("row_groups", []),
                lambda j: j.__setitem__("rows", 2**70),
                lambda j: j["spec"].__setitem__("seed", "x"),
                lambda j: j.__setitem__("files", None),
                lambda j: j.__setitem__("columns", [1]),
                lambda j: j["spec"].__setitem__("output", None),
                lambda j: j.pop("spec"),
                lambda j: j.__setitem__("version", "x"),
                lambda j: j.__setitem__("version", None),
                lambda j: j["files"][0].__setitem__("row_groups", [2**70]),
            ]
        )
    }
    for name, value in (("samples", -1), ("shards", 10**12), ("variants", 0), ("new", {})):
        edits[f"extra-{name}"] = change(PLAN, lambda j, n=name, v=value: j.__setitem__(n, v))
    edits |= {
        f"plan-raw{i}": put(PLAN, d)
        for i, d in enumerate(
            [b"[" * 100000, b"{}", b"[]", b"null", b"5", b"", b"\xff", b'{"version": 2}']
        )
    }
    a, s = shapes(ctx, edits, ["verify", "status", "resume", "clean"])
    r["7-plan-shape"] = (a, s)


def job_shapes(ctx: Ctx, r: dict[str, Any]) -> None:
    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    a, s = shapes(
        ctx,
        {
            f"job-{i}": put("job.yaml", d)
            for i, d in enumerate(
                [
                    b"input: 2024-13-45\n",
                    b"[]",
                    b"null",
                    bomb.encode(),
                    b"!!python/object/apply:os.system ['touch /tmp/pwned']\n",
                    b"input: {path:",
                    b"\xff\xfe\x00",
                    b"{s3: {1: 2}}",
                    b"[" * 5000,
                    b"a: &a {b: *a}\n",
                ]
            )
        },
        ["resume", "status"],
    )
    r["new-7-job-shape"] = (a, s)


def not_numbers(ctx: Ctx, r: dict[str, Any]) -> None:
    out = ctx.base(name="tmpl")
    m = (out / "_batchgen" / MARKER).read_text()
    lease = (out / "_batchgen" / LEASE).read_text()
    p = (out / "_batchgen/plan.json").read_text()
    edits = {}
    for nm, tx, path in (("marker", m, MARKER), ("lease", lease, LEASE), ("plan", p, PLAN)):
        for k, d in {
            "nan": re.sub(
                r'("(?:finished_at|renewed_at|guidance_scale)": )[\d.]+', r"\1NaN", tx, count=1
            ).encode(),
            "inf": re.sub(
                r'("(?:finished_at|renewed_at|guidance_scale)": )[\d.]+', r"\g<1>1e999", tx, count=1
            ).encode(),
            "utf16": tx.encode("utf-16"),
            "bom": b"\xef\xbb\xbf" + tx.encode(),
            "nul": tx.encode() + b"\0",
            "surr": tx.replace('"', '"\\ud800', 1).encode(),
            "trunc": tx.encode()[: len(tx) // 2],
        }.items():
            edits[f"{'x' if k in ('nan', 'inf', 'bom', 'surr', 'utf16') else ''}{nm}-{k}"] = put(
                path, d
            )
    r["new-7-nan"] = shapes(ctx, edits, ["verify", "status", "resume"])


@attack(
    "7-shapes",
    "",
    {
        "7-lease-shape": "lease {} [] null 5 truncated: run, resume, clean, status",
        "7-failed-shape": "failed marker truncated, with a new field, [], {}: status and resume",
        "7-marker-shape": (
            "marker with counts.accepted '', files.0.name 1, []: verify, status, export, resume"
        ),
        "7-plan-shape": "plan with model null, rows 'x', row_groups [], rows 2**70, [[[[",
        "new-7-job-shape": "job.yaml: wrong date, list, null, bomb, !!python, truncated, binary",
        "new-7-nan": (
            "NaN, Infinity, -1, 1e999, duplicate keys, NUL, UTF-16, BOM, lone surrogates "
            "in each record"
        ),
    },
)
def a7s(ctx: Ctx) -> Result:
    r = {}
    r["7-lease-shape"] = shapes(
        ctx,
        {
            f"lease-{i}": put(LEASE, d)
            for i, d in enumerate(
                [
                    {},
                    [],
                    None,
                    5,
                    b"",
                    b"{",
                    b"\xff",
                    "x",
                    {"owner": 1, "renewed_at": "x", "released": None},
                    {"owner": "a", "renewed_at": 1e999, "released": False},
                    b"[" * 100000,
                ]
            )
        },
        ["resume", "clean", "status", "verify"],
    )
    failed_shapes(ctx, r)
    marker_shapes(ctx, r)
    plan_shapes(ctx, r)
    job_shapes(ctx, r)
    not_numbers(ctx, r)
    return r


@attack("7-future", "marker, failed marker, lease, plan of a FUTURE format: bad advice 'remove it'")
def a7f(ctx: Ctx) -> Result:
    seen, good = [], True

    def bump(j: Any) -> None:
        keys = [k for k in j if "version" in k and isinstance(j[k], int)]
        j[keys[0] if keys else "version"] = 999
        j["of_the_future"] = {"x": 1}

    for name in ("shards/00000.json", "plan.json", "lease/00001.json"):
        out = ctx.base(name=name.replace("/", "-"))
        change(name, bump)(out)
        v = ctx.cli("verify", out)
        s = ctx.cli("resume", out, heavy=False)
        t = ctx.cli("status", out)
        text = v.text + s.text + t.text
        adv = bool(re.search(r"remove (it|that marker)", text))
        newer = any(
            w in text.lower()
            for w in ("newer", "later version", "version 999", "update batchgen", "upgrade")
        )
        g = not (v.tb or s.tb or t.tb) and not adv and (newer or name.startswith("lease"))
        good &= g
        seen.append(
            f"{name}: verify {v.rc} resume {s.rc} status {t.rc}, says remove: {adv}, "
            f"says newer: {newer}"
        )
        if name.startswith("shards"):
            (out / "_batchgen" / name).read_text()
            rp = ctx.cli("verify", out, "--repair", heavy=True, timeout=120)
            kept = (out / "_batchgen" / name).exists() and "of_the_future" in (
                out / "_batchgen" / name
            ).read_text()
            seen.append(f"--repair rc {rp.rc} keeps it: {kept}{' TB' if rp.tb else ''}")
            good &= kept and not rp.tb
    out = ctx.base(name="failed")
    drop_shard(out)
    put(
        "failed/00001.json",
        {
            "version": 999,
            "shard": 1,
            "planned": 4,
            "error": "E",
            "message": "m",
            "traceback": "",
            "attempts": 1,
            "host": "h",
            "failed_at": 1.0,
            "why": 1,
        },
    )(out)
    s = ctx.cli("status", out)
    rs = ctx.cli("resume", out)
    seen.append(f"failed: status {s.rc}, resume {rs.rc}")
    good &= not s.tb and not rs.tb
    return good, "; ".join(seen)
