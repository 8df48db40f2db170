"""Section 3: single rows whose pictures or addresses spoil a shard."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.edits import i2i, png, send
from tests.attacks.kit import Result, attack
from tests.attacks.readers import reasons_of, rejects_of, rows_of

DROP = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def uris(
    ctx: Ctx,
    name: str,
    bad: list[str],
    prefix: Any = (),
    env: Any = None,
    also: Any = (),
    **dotted: Any,
) -> Any:
    """Good rows and these bad URIs in one shard: accepted good rows, reasons, error."""
    good = ctx.dir / "good.png"
    good.write_bytes(png())
    n = 4
    src = ctx.table(
        f"{name}.parquet",
        {"prompt": ["x"] * (n + len(bad)), "image": ["good.png"] * 2 + bad + ["good.png"] * 2},
    )
    out = ctx.dir / f"o-{name}"
    got = ctx.inproc(
        i2i(src, out, output__samples_per_shard=n + len(bad), **dotted),
        timeout=150,
        prefix=prefix,
        env=env,
    )[0]
    acc, rea = len(rows_of(out)), reasons_of(out)
    v = ctx.cli("verify", out) if not got.get("error") else None
    fine = acc >= n and acc + sum(rea.values()) == n + len(bad) and v is not None and v.rc == 0
    longest = max([len(x.get("message") or "") for x in rejects_of(out)] or [0])
    return (
        fine,
        (
            f"{acc} of {n} good, rejects {rea}, longest message {longest}, "
            f"{ctx.last_out.secs:.0f} s{' TIMEOUT' if ctx.last_out.timed_out else ''} "
            f"{got.get('type', '')} {got.get('error', '')[:170]}"
        ),
    )


ODD = {
    "fifo": ["fifo.png"],
    "special": ["dir.png", "s.png", "/dev/zero", "file:///dev/stdin", "/proc/self/mem"],
    "text": [
        "é" * 3000,
        "x" * 100000 + ".png",
        "%",
        "%zz.png",
        "a%00.png",
        "\\\\host\\x.png",
        "//",
        ".",
        "..",
        "/",
        " ",
        "\n",
        "?",
        "#",
        "~",
        "~root/x.png",
    ],
    "hosts": [
        "http://[::1%25eth0]/x.png",
        "http://127.0.0.1:99999999/x",
        "http:///x.png",
        "http://",
        "https://",
        "http://a b/x.png",
        "http://\u2028/x",
        "http://xn--/x.png",
        "http://" + "a" * 300 + "/x.png",
        "http://.../x",
        "http://127.0.0.1:1/x.png",
    ],
    "protocols": [
        "simplecache::http://x/y",
        "zip://a.png::x.zip",
        "memory://x",
        "github://a:b@c/x",
        "reference://",
        "dask://x",
        "foo://x",
        "ftp://127.0.0.1:1/x",
        "hf://datasets/x/y.png",
        "blockcache::file:///etc/passwd",
        "local://etc/passwd",
        "git://x",
        "sftp://127.0.0.1:1/x",
        "jupyter://x",
        "s3://[x/y",
        "gs://x/y",
        "data:,x",
        "javascript:1",
    ],
}
ODD_ROOTS = {
    "special": ["http://", "https://", "/dev", "/proc"],
    "hosts": ["http://", "https://", "/dev", "/proc"],
    "protocols": [
        *("ftp://", "sftp://", "memory://", "github://", "foo://"),
        *("zip://", "reference://", "dask://", "git://"),
    ],
}


@attack(
    "3.1",
    "",
    {
        "3.1-data-uri": (
            "data:image/png;base64,... of 4.8 KB, and of 300 bytes where a folder of that name is"
        ),
        "3.1-nul": "a NUL in a path",
        "3.1-loop": "a symlink loop",
        "3.1-bracket": "http://[bad/x",
        "3.1-eacces": "a file that may not be read",
        "3.1-cli": "4 data: rows of 64 with the real CLI: job must not stop",
        "new-3.1-odd": (
            "a FIFO, a device, a directory, a socket, lone surrogates, 100 KB path, IPv6 "
            "zone, port 99999999, empty host, unknown and chained protocols"
        ),
    },
)
def a31(ctx: Ctx) -> Result:
    r = {}
    data = "data:image/png;base64," + base64.b64encode(png() * 40).decode()[:4800]
    (ctx.dir / "data:image").mkdir()
    r["3.1-data-uri"] = uris(ctx, "data", [data, data[:300]])
    r["3.1-nul"] = uris(ctx, "nul", ["a\0.png"])
    (ctx.dir / "l1.png").symlink_to("l2.png")
    (ctx.dir / "l2.png").symlink_to("l1.png")
    r["3.1-loop"] = uris(ctx, "loop", ["l1.png"])
    r["3.1-bracket"] = uris(
        ctx, "bracket", ["http://[bad/x"], input__uri_roots=["http://", str(ctx.dir)]
    )
    (ctx.dir / "secret.png").write_bytes(png())
    os.chmod(ctx.dir / "secret.png", 0)
    r["3.1-eacces"] = uris(ctx, "eacces", ["secret.png"], prefix=DROP)
    src = ctx.table("c.parquet", {"prompt": ["x"] * 64, "image": ([data] + ["good.png"] * 15) * 4})
    o = ctx.cli(
        "run",
        "--task",
        "image-to-image",
        "--input",
        src,
        "--image-column",
        "image",
        "--output",
        ctx.dir / "cli",
        "--steps",
        2,
        "--samples-per-shard",
        16,
        timeout=240,
    )
    n = len(rows_of(ctx.dir / "cli"))
    r["3.1-cli"] = (
        o.rc == 0 and n >= 60 and len(o.text) < 6000,
        f"rc {o.rc}, {n} of 60 good made, {len(o.text)} letters printed; {o.msg()}",
    )
    os.mkfifo(ctx.dir / "fifo.png")
    (ctx.dir / "dir.png").mkdir()

    s = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        s.bind(str(ctx.dir / "s.png")[:107])
    seen, good = [], True
    for name, bad in ODD.items():
        roots = ODD_ROOTS.get(name, ())
        more = {"input__uri_roots": [*roots, str(ctx.dir)]} if roots else {}
        g, t = uris(ctx, "n-" + name, bad, input__uri_timeout_s=3, storage__patience_s=1, **more)
        good &= g
        seen.append(f"{name}: {'ok' if g else t}")
    r["new-3.1-odd"] = (good, "; ".join(seen))
    return r


@attack("3.1-s3-403", "an S3 key that answers 403 (missing without ListBucket) stops the whole job")
def a31s3(ctx: Ctx) -> Result:
    body = png()

    def h(q: Any) -> None:
        p = q.path.split("?")[0]
        if p.startswith("/photos/good"):
            send(
                q,
                body,
                ETag='"1"',
                Content_Type="image/png",
                Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT",
            )
        else:
            send(
                q,
                (
                    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access "
                    b"Denied</Message></Error>"
                ),
                403,
                Content_Type="application/xml",
            )

    base, seen = ctx.serve(h)
    src = ctx.table(
        "s.parquet",
        {
            "prompt": ["x"] * 6,
            "image": ["s3://photos/good1.png"] * 2
            + ["s3://photos/missing.png", "s3://photos/secret.png"]
            + ["s3://photos/good2.png"] * 2,
        },
    )
    out = ctx.dir / "out"
    env = {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": base,
    }
    got = ctx.inproc(
        i2i(
            src,
            out,
            output__samples_per_shard=6,
            input__uri_roots=["s3://photos"],
            storage__patience_s=2,
        ),
        env=env,
        timeout=120,
    )[0]
    acc, rea = len(rows_of(out)), reasons_of(out)
    return (
        acc == 4 and sum(rea.values()) == 2,
        (
            f"{acc} of 4 good, {rea}, {len(seen)} requests; {got.get('type', '')} "
            f"{got.get('error', '')[:200]}"
        ),
    )
