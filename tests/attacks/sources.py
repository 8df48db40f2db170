"""Section 6: servers and files that lead out of allowed roots or expand in memory."""

from __future__ import annotations

import gzip
import io
import urllib.parse
import zlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.attacks.context import Ctx
from tests.attacks.edits import i2i, png, send, spec
from tests.attacks.kit import Result, attack
from tests.attacks.readers import reasons_of, rows_of


def encodings(base: str, go: Any, r: dict[str, Any]) -> None:
    h_, p_ = "127.0.0.1", base.rpartition(":")[2]
    r["new-6-encodings"] = go(
        "enc",
        [
            f"{base}/photos/%252e%252e/private/s.png",
            f"{base}/photos/..%5cprivate/s.png",
            f"{base}/photos/..;/private/s.png",
            f"{base}/photos%2f..%2fprivate/s.png",
            f"{base}/photos/%2e%2e%2fprivate/s.png",
            f"{base}/photos/x/..%252fprivate",
            f"{base}/photos/.%2e/private/s.png",
            f"{base}/photos/..\\private\\s.png",
            f"{base}/photos/%u002e%u002e/private",
            f"http://user@{h_}:{p_}/private/s.png",
            f"http://{h_}:{p_}@127.0.0.1:{p_}/private",
            f"{base}/photos/..%c0%afprivate/s.png",
            f"{base}/photos/.%09./private/s.png",
            f"{base}/photos/\t../private/s.png",
            f"{base}/photos/..%2f..%2fprivate",
            f"{base}/photosprivate/s.png",
            f"http://{h_}:{p_}/photos/../private/s.png",
            f"HTTP://{h_}:{p_}/private/s.png",
            f"http://{h_}:0{p_}/private/s.png",
        ],
    )


@attack(
    "6-escape",
    "",
    {
        "6-2f": "uri_roots left by ..%2f on an http root",
        "6-redirect": "uri_roots left through a redirect with ..%2f",
        "new-6-encodings": (
            "other ways out: %252e, %5c, ;/.., /photos%2f.., //, /photos../, case of host, "
            "port 080, userinfo, trailing dot"
        ),
    },
)
def a6e(ctx: Ctx) -> Result:
    r = {}
    body = png()

    def h(q: Any) -> Any:
        raw = q.path
        path = urllib.parse.unquote(raw)
        if raw.startswith("/photos/redir"):
            return send(q, b"", 302, Location=f"{base}/photos/..%2fprivate/s.png")
        if raw.startswith("/photos/rel"):
            return send(q, b"", 302, Location="../private/s.png")
        if raw.startswith("/photos/abs"):
            return send(
                q, b"", 302, Location=f"//127.0.0.1:{int(base.rpartition(':')[2])}/private/s.png"
            )
        import posixpath

        for _ in range(2):
            path = urllib.parse.unquote(path)
        if "private" in path and not posixpath.normpath(
            path.replace("\\", "/").replace("..;", "..")
        ).startswith("/photos/"):
            hits.append(raw)
        send(q, body)

    hits: list[str] = []
    base, _seen = ctx.serve(h)
    good = f"{base}/photos/g.png"

    def go(name: str, bad: Any, roots: Any = None) -> Any:
        hits.clear()
        src = ctx.table(
            f"{name}.parquet", {"prompt": ["x"] * (2 + len(bad)), "image": [good, *bad, good]}
        )
        out = ctx.dir / f"o-{name}"
        got = ctx.inproc(
            i2i(
                src,
                out,
                input__uri_roots=roots or [f"{base}/photos"],
                output__samples_per_shard=2 + len(bad),
                input__uri_timeout_s=5,
            ),
            timeout=120,
        )[0]
        n = len(rows_of(out))
        return (
            n >= 2 and not hits and not got.get("error"),
            (
                f"{n - 2} of {len(bad)} accepted, private asked for: {hits[:4]}, "
                f"{reasons_of(out)} {got.get('error', '')[:120]}"
            ),
        )

    r["6-2f"] = go("2f", [f"{base}/photos/..%2fprivate/s.png", f"{base}/photos/..%2Fprivate/s.png"])
    r["6-redirect"] = go(
        "redir", [f"{base}/photos/redir.png", f"{base}/photos/rel.png", f"{base}/photos/abs.png"]
    )
    encodings(base, go, r)
    return r


def swelling() -> Any:
    """Bodies of some KB that are 300 MB within."""
    b = io.BytesIO()
    with gzip.GzipFile(fileobj=b, mode="wb") as g:
        for _ in range(300):
            g.write(bytes(1 << 20))
    bomb = b.getvalue()

    z = zlib.compressobj()
    d = b"".join(z.compress(bytes(1 << 20)) for _ in range(300)) + z.flush()
    dbl = gzip.compress(bomb)
    return bomb, d, dbl


@attack(
    "6-gzip",
    "",
    {
        "6-gzip": "gzip bomb: 300 KB answer, 300 MB within, uri_limit 1 MiB",
        "new-6-gzip-other": (
            "deflate, br and double gzip bombs; a chunked answer without end; Content-Length lies"
        ),
    },
)
def a6g(ctx: Ctx) -> Result:
    r = {}
    bomb, d, dbl = swelling()
    enc: list[str] = []

    def h(q: Any) -> None:
        enc.append(q.headers.get("Accept-Encoding", ""))
        if "good" in q.path:
            send(q, png())
        elif "gz" in q.path:
            send(q, bomb, Content_Encoding="gzip")
        elif "deflate" in q.path:
            send(q, d, Content_Encoding="deflate")
        elif "dbl" in q.path:
            send(q, dbl, Content_Encoding="gzip, gzip")
        elif "short" in q.path:
            send(q, png(), 200)
        elif "chunk" in q.path:
            q.send_response(200)
            q.send_header("Transfer-Encoding", "chunked")
            q.end_headers()
            for _ in range(3000):
                q.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        elif "lie" in q.path:
            q.send_response(200)
            q.send_header("Content-Length", "100")
            q.end_headers()
            q.wfile.write(bytes(100_000_000))
            q.close_connection = True

    base, _seen = ctx.serve(h)

    def go(name: str, uris: Any) -> Any:
        src = ctx.table(
            f"{name}.parquet",
            {
                "prompt": ["x"] * (2 + len(uris)),
                "image": [f"{base}/good.png"] * 2 + [f"{base}/{u}" for u in uris],
            },
        )
        out = ctx.dir / f"o-{name}"
        ctx.inproc(
            i2i(
                ctx.table("r.parquet", {"prompt": ["x"] * 2, "image": [f"{base}/good.png"] * 2}),
                ctx.dir / f"ref-{name}",
                input__uri_roots=[base],
            )
        )
        rss0 = ctx.last_out.rss_mb
        got = ctx.inproc(
            i2i(
                src,
                out,
                input__uri_roots=[base],
                input__uri_limit_bytes=1 << 20,
                output__samples_per_shard=2 + len(uris),
            ),
            timeout=150,
        )[0]
        grown = ctx.last_out.rss_mb - rss0
        n = len(rows_of(out))
        return (
            n == 2 and grown < 150,
            (
                f"peak +{grown:.0f} MB over {rss0:.0f}, {n} accepted of 2 good, "
                f"{reasons_of(out)}, Accept-Encoding {enc[-1]!r}; "
                f"{got.get('error', '')[:120]}"
            ),
        )

    r["6-gzip"] = go("gz", ["gz.png"])
    r["new-6-gzip-other"] = go("other", ["deflate.png", "dbl.png", "chunk.png", "lie.png"])
    return r


@attack(
    "6-dictionary",
    "dictionary bomb: Parquet below 1 KB.. (one value of 4 MB, 600 rows): the reader's memory",
)
def a6d(ctx: Ctx) -> Result:
    src = ctx.dir / "bomb.parquet"
    pq.write_table(
        pa.table({"prompt": ["a"] * 600, "blob": ["x" * 4_000_000] * 600}),
        src,
        compression="zstd",
        use_dictionary=True,
    )
    ref = ctx.prompts(4)
    ctx.inproc(spec(ref, ctx.dir / "ref"))
    rss0 = ctx.last_out.rss_mb
    # only what is read for one shard: 2 of the 600 rows make a shard
    got = ctx.inproc(
        spec(src, ctx.dir / "out", input__limit=4, output__samples_per_shard=2),
        timeout=200,
        limit_gb=24,
    )[0]
    grown = ctx.last_out.rss_mb - rss0
    n = len(rows_of(ctx.dir / "out"))
    return (
        (n == 4 or got.get("error")) and grown < 700,
        (
            f"file {src.stat().st_size} bytes, peak +{grown:.0f} MB over {rss0:.0f}; {n} of "
            f"4 made, {ctx.last_out.secs:.0f} s; {got.get('type', '')} "
            f"{got.get('error', '')[:120]}"
        ),
    )


@attack("6-pictures", "8192x8192 pictures of 65-260 KB: 1.2-2.1 GB and 2-7 s each, two at a time")
def a6p(ctx: Ctx) -> Result:
    ims = []
    for mode, color in (
        ("RGB", (9, 9, 9)),
        ("RGBA", (1, 2, 3, 4)),
        ("L", 7),
        ("P", 3),
        ("CMYK", (1, 2, 3, 4)),
        ("I;16", 300),
    ):
        b = io.BytesIO()
        im = Image.new(mode, (8192, 8192), color)
        try:
            im.save(
                b,
                "TIFF" if mode == "CMYK" else "PNG",
                **({"compression": "tiff_adobe_deflate"} if mode == "CMYK" else {}),
            )
        except Exception:
            continue
        ims.append((mode, b.getvalue()))
    ref = ctx.table("r.parquet", {"prompt": ["x"], "image": [png()]})
    ctx.inproc(i2i(ref, ctx.dir / "ref", policy__reject_flat=False))
    rss0, s0 = ctx.last_out.rss_mb, ctx.last_out.secs
    seen, worst = [], 0
    for mode, b in ims:
        src = ctx.table(f"{mode.replace(';', '')}.parquet", {"prompt": ["x"] * 2, "image": [b] * 2})
        out = ctx.dir / f"o-{mode.replace(';', '')}"
        ctx.inproc(i2i(src, out, policy__reject_flat=False), timeout=150)
        grown = ctx.last_out.rss_mb - rss0
        worst = max(worst, grown)
        seen.append(
            f"{mode} {len(b) // 1024} KB: +{grown:.0f} MB, "
            f"{(ctx.last_out.secs - s0) / 2:.1f} s each, {len(rows_of(out))} made "
            f"{list(reasons_of(out))}"
        )
    return worst < 900, "; ".join(seen)
