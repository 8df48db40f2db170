"""Section 2: what verify must find, and what it must not."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.attacks.context import Ctx
from tests.attacks.edits import data_file, fix_marker, png, retable, set_cell, spec
from tests.attacks.kit import BROKEN, HELD, OTHER, Result, attack
from tests.attacks.readers import reasons_of, rows_of

_27 = {
    "prompt": "prompt changed (cannot follow from the plan: seen only)",
    "seed": "seed column changed",
    "width": "width changed",
    "model_id": "model_id changed",
    "task": "task changed",
    "model_revision": "model_revision changed",
    "guidance": "guidance_scale changed",
    "exchange": "two images exchanged (path names the other key)",
    "key": "key renamed",
    "zero": "zero-byte image",
    "dropcols": "columns prompt, seed dropped",
    "notimage": "an image of text bytes",
    "size": "an image of another size",
    "null": "null image",
    "control": "control: rewritten without a change (must verify)",
}


@attack("2.7", "", {f"2.7-{k}": f"data and marker edited together: {t}" for k, t in _27.items()})
def a27(ctx: Ctx) -> Result:
    r = {}

    def setimg(body: Any) -> Any:
        def e(t: Any) -> Any:
            t = set_cell(t, "image", 0, lambda v: {"bytes": body, "path": v["path"]})
            return set_cell(t, "sha256", 0, hashlib.sha256(body).hexdigest())

        return e

    def exchange(t: Any) -> Any:
        i = t.column("image").to_pylist()
        s = t.column("sha256").to_pylist()
        t = set_cell(t, "image", 0, i[1])
        t = set_cell(t, "image", 1, i[0])
        t = set_cell(t, "sha256", 0, s[1])
        return set_cell(t, "sha256", 1, s[0])

    edits = {
        "prompt": lambda t: set_cell(t, "prompt", 0, "other"),
        "seed": lambda t: set_cell(t, "seed", 0, 7),
        "width": lambda t: set_cell(t, "width", 0, 64),
        "model_id": lambda t: set_cell(t, "model_id", 0, "evil"),
        "task": lambda t: set_cell(t, "task", 0, "inpainting"),
        "model_revision": lambda t: set_cell(t, "model_revision", 0, "x"),
        "guidance": lambda t: set_cell(t, "guidance_scale", 0, 9.0),
        "exchange": exchange,
        "key": lambda t: set_cell(t, "key", 0, "renamed-v0"),
        "zero": setimg(b""),
        "dropcols": lambda t: t.drop_columns(["prompt", "seed"]),
        "notimage": setimg(b"hello world, not an image"),
        "size": setimg(png(size=(16, 16))),
        "null": lambda t: set_cell(t, "image", 0, None),
        "control": lambda t: t,
    }
    for k, e in edits.items():
        shutil.rmtree(ctx.dir / "out", ignore_errors=True)
        out = ctx.base()
        retable(out, e)
        v = ctx.cli("verify", out)
        good = v.rc == (0 if k == "control" else 4) and not v.tb
        r[f"2.7-{k}"] = (
            HELD if good else (OTHER if k == "prompt" and not v.tb else BROKEN),
            (
                f"verify {v.rc}{' TRACEBACK' if v.tb else ''}: "
                f"{v.text.splitlines()[0][:150] if v.text else ''}"
            ),
        )
    return r


def edited_folders(ctx: Ctx, seen: list[str]) -> bool:
    good = True
    for k in ("seed", "name", "image"):
        out = ctx.base("image-folder", name=f"f-{k}")
        f = next((out / "data").rglob("00000/metadata.jsonl"), None) or next(
            (out / "data").rglob("metadata.jsonl")
        )
        js = [json.loads(x) for x in f.read_text().splitlines()]
        if k == "seed":
            js[0]["seed"] = 7
        if k == "name":
            js[0]["file_name"], js[1]["file_name"] = js[1]["file_name"], js[0]["file_name"]
            js[0]["sha256"], js[1]["sha256"] = js[1]["sha256"], js[0]["sha256"]
        if k == "image":
            (f.parent / js[0]["file_name"]).write_bytes(b"zzz")
            js[0]["sha256"] = hashlib.sha256(b"zzz").hexdigest()
        f.write_text("".join(json.dumps(j) + "\n" for j in js))
        fix_marker(out, 0)
        v = ctx.cli("verify", out)
        good &= v.rc == 4 and not v.tb
        seen.append(f"{k}: {v.rc}{' TRACEBACK' if v.tb else ''}")
    return good


@attack(
    "new-2.7",
    "",
    {
        "new-2.7-tar": "the same edits in a WebDataset tar (seed, key, image, an extra member)",
        "new-2.7-folder": "the same edits in an image folder (seed, file_name to another, image)",
        "new-2.7-extra-file": (
            "an extra image beside metadata.jsonl, an extra tar, a sub-folder in data/"
        ),
        "new-2.7-rejects": (
            "accepted row moved to rejects with a made-up reason, counts fitted (key stays "
            "planned: seen only)"
        ),
    },
)
def n27(ctx: Ctx) -> Result:
    r = {}
    seen, good = [], True
    for k in ("seed", "key", "image", "member"):
        out = ctx.base("webdataset", name=f"w-{k}")
        f = data_file(out)
        with tarfile.open(f) as t:
            ms = [(m.name, t.extractfile(m).read()) for m in t.getmembers()]
        new = []
        for n, b in ms:
            if n == next(x for x, _ in ms if x.endswith(".json")) and k in ("seed", "image"):
                j = json.loads(b)
                if k == "seed":
                    j["seed"] = 7
                else:
                    j["sha256"] = hashlib.sha256(b"zzz").hexdigest()
                b = json.dumps(j).encode()
            if k == "image" and n == next(x for x, _ in ms if x.endswith(".png")):
                b = b"zzz"
            if k == "key" and n.split(".")[0] == ms[0][0].split(".")[0]:
                n = "renamed-v0." + n.split(".", 1)[1]
                b = (
                    json.dumps({**json.loads(b), "key": "renamed-v0"}).encode()
                    if n.endswith("json")
                    else b
                )
            new.append((n, b))
        if k == "member":
            new.append(("../../../evil.sh", b"x"))
        with tarfile.open(f, "w") as t:
            for n, b in new:
                i = tarfile.TarInfo(n)
                i.size = len(b)
                t.addfile(i, io.BytesIO(b))
        fix_marker(out, 0)
        v = ctx.cli("verify", out)
        good &= v.rc == 4 and not v.tb
        seen.append(f"{k}: {v.rc}{' TRACEBACK' if v.tb else ''}")
    r["new-2.7-tar"] = (good, "; ".join(seen))
    seen, good = [], True
    good = edited_folders(ctx, seen)
    r["new-2.7-folder"] = (good, "; ".join(seen))
    seen, good = [], True
    for fmt, place in (
        ("image-folder", None),
        ("webdataset", "data/zz.tar"),
        ("parquet", "data/sub/x.parquet"),
        ("parquet", "data/.hidden"),
    ):
        out = ctx.base(fmt, name=f"x-{len(seen)}")
        p = (
            (next((out / "data").rglob("metadata.jsonl")).parent / "extra.png")
            if place is None
            else out / place
        )
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(png())
        v = ctx.cli("verify", out)
        good &= v.rc == 4 and not v.tb
        seen.append(f"{fmt} {p.name}: {v.rc}")
    r["new-2.7-extra-file"] = (good, "; ".join(seen))
    out = ctx.base(name="rej")
    r["new-2.7-rejects"] = (OTHER, "not tried")
    return r


def run_and_verify(ctx: Ctx, name: str, src: Path, **dotted: Any) -> Any:
    out = ctx.dir / f"o-{name}"
    got = ctx.inproc(spec(src, out, **dotted))[0]
    if got.get("error"):
        refused = bool({"UsageError", "InputError", "SpecError"} & set(got.get("bases", [])))
        return refused, f"{name}: {'refused' if refused else got.get('type')}: {got['error'][:110]}"
    v = ctx.cli("verify", out)
    e = ctx.cli(
        "export",
        out,
        ctx.dir / f"e-{name}",
        "--format",
        "image-folder" if dotted.get("output__format") != "image-folder" else "webdataset",
    )
    v2 = ctx.cli("verify", ctx.dir / f"e-{name}")
    good = v.rc == 0 and e.rc == 0 and v2.rc == 0
    return (
        good,
        (
            f"{name}: run ok ({len(rows_of(out))} rows, {reasons_of(out)}), verify {v.rc}, "
            f"export {e.rc}, verify {v2.rc} "
            f"{v.text.splitlines()[0][:90] if v.rc else ''}{e.msg(90) if e.rc else ''}"
        ),
    )


@attack(
    "2.8",
    "",
    {
        "2.8-dates": (
            "runs that exit 0 and never verify: timestamp('us') 2**60, date32 2**30 kept, "
            "in webdataset/image-folder"
        ),
        "2.8-bool8": "bool8 extension column kept, in webdataset",
        "2.8-time64": "time64('ns') loses its nanoseconds in silence (webdataset)",
        "2.8-null-key": "a key literally null-key-<file>-00000000 beside a null key",
        "2.8-xff": "text b'\\xff' beside a key that is not UTF-8",
    },
)
def a28(ctx: Ctx) -> Result:
    r = {}
    P = ["a", "b", "c", "d"]
    seen, good = [], True
    for name, arr in {
        "ts": pa.array([2**60, 1, 2, 3], pa.timestamp("us")),
        "date": pa.array([2**30, 1, 2, 3], pa.date32()),
    }.items():
        for fmt in ("webdataset", "image-folder"):
            g, s = run_and_verify(
                ctx,
                f"{name}-{fmt}",
                ctx.table(f"{name}.parquet", {"prompt": P, "when": arr}),
                output__format=fmt,
            )
            good &= g
            seen.append(s)
    r["2.8-dates"] = (good, "; ".join(seen))
    try:
        arr = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, 1, 0], pa.int8()))
        g, s = run_and_verify(
            ctx,
            "bool8",
            ctx.table("b8.parquet", {"prompt": P, "flag": arr}),
            output__format="webdataset",
        )
        r["2.8-bool8"] = (g, s)
    except Exception as e:
        r["2.8-bool8"] = (OTHER, f"not made: {e}")
    g, s = run_and_verify(
        ctx,
        "time64",
        ctx.table(
            "t64.parquet", {"prompt": P, "t": pa.array([1, 1001, 123456789, 5], pa.time64("ns"))}
        ),
        output__format="webdataset",
    )
    back = sorted(str(x.get("t")) for x in rows_of(ctx.dir / "o-time64"))
    kept = any("123456789" in b for b in back)
    r["2.8-time64"] = (g and (kept or "refused" in s), f"{s}; texts {back}")
    g, s = run_and_verify(
        ctx,
        "nullkey",
        ctx.table(
            "k.parquet",
            {
                "prompt": P,
                "id": [None, "null-key-k-00000000", "null-key-k.parquet-00000000", "k-00000000"],
            },
        ),
        input__columns__key="id",
    )
    r["2.8-null-key"] = (g, s)
    bad = pa.array([b"\xff", b"b'\\xff'", b"b'\\xff'-v0", b"x"], pa.binary()).view(pa.binary())
    arr = pa.Array.from_buffers(pa.string(), 4, bad.buffers())
    g, s = run_and_verify(
        ctx, "xff", ctx.table("x.parquet", {"prompt": P, "id": arr}), input__columns__key="id"
    )
    r["2.8-xff"] = (g, s)
    return r
