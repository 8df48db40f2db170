"""Section 3: kinds of columns and prompts that spoil every shard."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from tests.attacks.context import Ctx
from tests.attacks.edits import spec
from tests.attacks.kit import Result, attack
from tests.attacks.readers import reasons_of, rows_of


def safe(fn: Any) -> Any:
    try:
        return fn()
    except Exception:
        return None


def metadata(P: Any, many: Any, r: dict[str, Any]) -> None:

    kinds = {
        "notjson": b"{",
        "list": b"[]",
        "infostring": b'{"info": "x"}',
        "featlist": b'{"info": {"features": []}}',
        "utf8": b"\xff\xfe",
        "num": b"5",
        "nullf": b'{"info": {"features": {"prompt": null, "label": 5}}}',
    }
    t = pa.table({"prompt": P, "label": P})
    r["3.2-metadata"] = many(
        {k: t.replace_schema_metadata({b"huggingface": v}) for k, v in kinds.items()}
    )


def nested(P: Any, many: Any, r: dict[str, Any]) -> None:
    sv = pa.array(P, pa.string_view())

    cases = {
        "lsv": safe(lambda: pa.array([["a"], ["b"], [], None], pa.list_(pa.string_view()))),
        "ssv": safe(lambda: pa.StructArray.from_arrays([sv], names=["v"])),
        "lv": safe(lambda: pa.array([[1], [2], [], None], pa.list_view(pa.int64()))),
        "ree": safe(lambda: pa.RunEndEncodedArray.from_arrays([2, 4], ["a", "b"])),
        "tensor": safe(
            lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(
                __import__("numpy").zeros((4, 2, 2))
            )
        ),
        "null": pa.nulls(4),
        "dict": pa.array(P).dictionary_encode(),
        "interval": safe(lambda: pa.array([(1, 2, 3)] * 4, pa.month_day_nano_interval())),
        "dec256": safe(lambda: pa.array([1, 2, 3, 4], pa.decimal256(60, 3))),
        "json": safe(lambda: pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * 4))),
    }
    seen, good = [], True
    for fmt in ("parquet", "webdataset"):
        g, s = many(
            {
                f"{k}-{fmt[0]}": pa.table({"prompt": P, "x": v})
                for k, v in cases.items()
                if v is not None
            },
            output__format=fmt,
        )
        good &= g
        seen.append(s)
    r["new-3.2-nested"] = (good, "; ".join(seen))


@attack(
    "3.2",
    "",
    {
        "3.2-metadata": "odd `huggingface` schema metadata (7 kinds): plan ok, every shard fails",
        "3.2-views": "kept string_view / binary_view columns",
        "3.2-uuid": "uuid column and label in webdataset/image-folder",
        "3.2-duplicates": "struct with duplicate field names in webdataset/image-folder",
        "new-3.2-nested": (
            "views in lists, structs and dictionaries; a run-end-encoded, a list_view, a "
            "fixed-shape tensor, a null column, an empty struct"
        ),
    },
)
def a32(ctx: Ctx) -> Result:
    r = {}
    P = ["a", "b", "c", "d"]

    def go(name: str, table: Any, **dotted: Any) -> Any:
        try:
            src = ctx.table(f"{name}.parquet", table)
        except Exception:
            return None, f"{name}: Parquet cannot hold it"
        out = ctx.dir / f"o-{name}"
        got = ctx.inproc(spec(src, out, **dotted), timeout=120)[0]
        if got.get("error"):
            refused = bool({"UsageError", "InputError"} & set(got.get("bases", [])))
            p = ctx.cli(
                "plan",
                "--input",
                src,
                "--output",
                ctx.dir / "zz",
                *[x for k, v in dotted.items() for x in ("--set", f"{k.replace('__', '.')}={v}")],
            )
            early = p.rc == 1 and not p.tb
            how = f"refused {'while planning' if early else 'LATE'}" if refused else got["type"]
            return refused and early, f"{name}: {how}: {got['error'][:80]}"
        v = ctx.cli("verify", out)
        n = len(rows_of(out))
        return n == 4 and v.rc == 0, f"{name}: {n} made, verify {v.rc}"

    def many(cases: Any, **dotted: Any) -> Any:
        res = [go(n, t, **dotted) for n, t in cases.items()]
        res = [x for x in res]
        return all(g in (True, None) for g, _ in res), "; ".join(s for g, s in res)

    metadata(P, many, r)
    r["3.2-views"] = many(
        {
            "sv": pa.table({"prompt": P, "s": pa.array(P, pa.string_view())}),
            "bv": pa.table(
                {"prompt": P, "s": pa.array([b"1", b"2", None, b"4"], pa.binary_view())}
            ),
            "svp": pa.table({"prompt": pa.array(P, pa.string_view())}),
        }
    )
    u = pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([bytes([i] * 16) for i in range(4)], pa.binary(16))
    )
    a, s1 = many({"uw": pa.table({"prompt": P, "id": u})}, output__format="webdataset")
    b, s2 = many(
        {"ul": pa.table({"prompt": P, "id": u})},
        output__format="image-folder",
        input__columns__label="id",
    )
    c, s3 = many({"up": pa.table({"prompt": P, "id": u})}, input__columns__key="id")
    r["3.2-uuid"] = (a and b and c, f"{s1}; {s2}; {s3}")
    st = pa.StructArray.from_arrays(
        [pa.array([1, 2, 3, 4]), pa.array([5, 6, 7, 8])],
        fields=[pa.field("x", pa.int64()), pa.field("x", pa.int64())],
    )
    a, s1 = many({"dw": pa.table({"prompt": P, "st": st})}, output__format="webdataset")
    b, s2 = many({"di": pa.table({"prompt": P, "st": st})}, output__format="image-folder")
    c, s3 = many({"dp": pa.table({"prompt": P, "st": st})})
    r["3.2-duplicates"] = (a and b and c, f"{s1}; {s2}; {s3}")
    nested(P, many, r)
    return r


@attack(
    "3.3-long-prompt",
    (
        "a prompt of 3 MB among others: 55-70 s tokenizing, 15 s contact sheet, whole "
        "prompt in the report's alt text"
    ),
)
def a33(ctx: Ctx) -> Result:
    src = ctx.table("p.parquet", {"prompt": ["a", "red circle " * 280_000, "c", "d"]})
    out = ctx.dir / "out"
    o = ctx.cli(
        "run",
        "--input",
        src,
        "--output",
        out,
        "--steps",
        1,
        "--set",
        "policy.rejected_limit=1",
        timeout=300,
    )
    rep = out / "_batchgen/report.html"
    size = rep.stat().st_size if rep.exists() else 0
    n = len(rows_of(out))
    return (
        (n >= 3 and o.secs < 60 and size < 2_000_000 and not o.tb and o.rc == 0),
        (
            f"rc {o.rc}, {n} made, {reasons_of(out)}, {o.secs:.0f} s, report "
            f"{size / 1e6:.1f} MB; {o.msg(100)}"
        ),
    )
