"""Section 9: hostile column names and pictures, which held and must hold."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from typing import Any

import pyarrow as pa
from PIL import Image

from tests.attacks.context import Ctx
from tests.attacks.edits import i2i, png, spec
from tests.attacks.kit import Result, attack
from tests.attacks.readers import reasons_of, rejects_of, rows_of

HOSTILE = [
    "key",
    "image",
    "prompt2",
    "sha256",
    "seed",
    "__index_level_0__",
    "file_name",
    "mask_file_name",
    "file_names",
    "x.png",
    "json",
    "cls",
    "__key__",
    "__url__",
    "",
    " ",
    ".",
    "..",
    "a/b",
    "../x",
    "a\nb",
    "a\tb",
    "<script>alert(1)</script>",
    "'; DROP TABLE x",
    "\u00e9",
    "e\u0301",
    "🦊",
    "a" * 5000,
    "NaN",
    "null",
    "\u202e",
    "source_key",
    "a,b",
]


@attack("9-columns", "33 hostile column names, in three formats, exports and the report")
def columns(ctx: Ctx) -> Result:
    src = ctx.table(
        "h.parquet",
        pa.table(
            [pa.array([f"p{i}" for i in range(4)])]
            + [pa.array([f"{j}-{i}" for i in range(4)]) for j, _ in enumerate(HOSTILE)],
            names=["prompt", *HOSTILE],
        ),
    )
    seen, good = [], True
    for fmt in ("parquet", "webdataset", "image-folder"):
        out = ctx.dir / fmt
        got = ctx.inproc(spec(src, out, output__format=fmt), timeout=120)[0]
        v = ctx.cli("verify", out)
        e = ctx.cli(
            "export",
            out,
            ctx.dir / f"e-{fmt}",
            "--format",
            {"parquet": "image-folder", "webdataset": "parquet", "image-folder": "webdataset"}[fmt],
        )
        v2 = ctx.cli("verify", ctx.dir / f"e-{fmt}")
        rows = rows_of(out)
        vals = {str(x) for r in rows for x in r.values()}
        have = sum(all(f"{j}-{i}" in vals for i in range(4)) for j in range(len(HOSTILE)))
        html = ctx.dir / f"e-{fmt}/_batchgen/report.html"
        esc = not html.exists() or "<script>alert(1)" not in html.read_text()
        g = (
            not got.get("error")
            and v.rc == 0
            and e.rc == 0
            and v2.rc == 0
            and len(rows) == 4
            and have == len(HOSTILE)
            and esc
        )
        good &= g
        seen.append(
            f"{fmt}: {len(rows)} rows, {have} of {len(HOSTILE)} columns' values, verify "
            f"{v.rc}, export {e.rc}, verify {v2.rc} "
            f"{got.get('error', '')[:120]}{v.text[:80] if v.rc else ''}"
            f"{e.msg(80) if e.rc else ''}"
        )
    return good, "; ".join(seen)


def chunk(t: Any, d: Any) -> Any:
    return struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))


def pngraw(
    w: Any,
    h: Any,
    extra: bytes = b"",
    data: Any = None,
    depth: int = 8,
    color: int = 2,
    inter: int = 0,
) -> Any:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, inter))
        + extra
        + chunk(b"IDAT", data if data is not None else zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def pil(mode: Any, size: Any, fmt: str, color: Any = None, **kw: Any) -> Any:
    b = io.BytesIO()
    im = Image.new(mode, size, color if color is not None else 0)
    im.save(b, fmt, **kw)
    return b.getvalue()


def hostile_images() -> Any:

    good = png()
    z = zlib.compress(bytes(100_000_000))
    ims = {
        "bomb-header": pngraw(60000, 60000),
        "bomb-max": pngraw(2**31 - 1, 2**31 - 1),
        "zero": pngraw(0, 0),
        "zero-w": pngraw(0, 5),
        "ztxt": pngraw(8, 8, chunk(b"zTXt", b"k\0\0" + z)),
        "itxt": pngraw(8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + z)),
        "iccp-bomb": pngraw(8, 8, chunk(b"iCCP", b"k\0\0" + z)),
        "eps": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/etc/passwd) (r) file\n"
            b"showpage\n"
        ),
        "svg": (
            b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'><image "
            b"href='file:///etc/passwd'/></svg>"
        ),
        "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
        "pickle": pickle.dumps({"a": 1}),
        "gz": __import__("gzip").compress(good),
        "zip": b"PK\x03\x04" + bytes(50),
        "html": b"<html>",
        "empty-png": b"\x89PNG\r\n\x1a\n",
        "trunc": good[: len(good) // 2],
        "trunc1": good[:-1],
        "crc": good[:40] + b"\0" + good[41:],
        "trailing": good + b"PK\x03\x04" * 1000,
        "polyglot": good + b"<script>",
        "jpeg-trunc": pil("RGB", (64, 64), "JPEG")[:-200],
        "jpeg-dqt": b"\xff\xd8\xff\xdb\x00\x43" + bytes(64) + b"\xff\xd9",
        "gif-frames": pil(
            "P",
            (32, 32),
            "GIF",
            3,
            save_all=True,
            append_images=[Image.new("P", (32, 32), i) for i in range(50)],
        ),
        "apng": pil(
            "RGB",
            (32, 32),
            "PNG",
            (9, 9, 9),
            save_all=True,
            append_images=[Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(9)],
        ),
        "exif-wrong": pil(
            "RGB", (32, 16), "JPEG", (1, 2, 3), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
        ),
        "icc-wrong": pil("RGB", (32, 32), "PNG", (5, 5, 5), icc_profile=b"not an icc" * 20),
        "lab": pil("LAB", (32, 32), "TIFF"),
        "float": pil("F", (32, 32), "TIFF"),
        "int32": pil("I", (32, 32), "TIFF"),
        "bit1": pil("1", (32, 32), "PNG"),
        "i16": pil("I;16", (32, 32), "PNG"),
        "la": pil("LA", (32, 32), "PNG", (9, 9)),
        "pa": pil("P", (32, 32), "PNG", 1, transparency=1),
        "cmyk": pil("CMYK", (32, 32), "JPEG", (9, 9, 9, 9)),
        "ycbcr": pil("YCbCr", (32, 32), "JPEG"),
        "thin": pil("RGB", (8192, 1), "PNG"),
        "tall": pil("RGB", (1, 8192), "PNG"),
        "one": pil("RGB", (1, 1), "PNG"),
        "webp": pil("RGBA", (32, 32), "WEBP", (1, 2, 3, 4)),
        "bmp-neg": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 5, -5, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(80),
        "bmp-huge": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 5, 1, 24, 0, 0, 0, 0, 0, 0),
        "tiff-loop": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
        "ppm-huge": b"P6 99999999 99999999 255\n",
        "ico": pil("RGBA", (32, 32), "ICO"),
        "tga": pil("RGB", (32, 32), "TGA"),
        "nul": bytes(1000),
        "fli": b"\0\0\0\0\x11\xaf" + bytes(200),
        "text": b"hello",
    }
    return ims


@attack(
    "9-images",
    (
        "hostile images: bombs by header, zTXt, EPS, SVG, PDF, pickles, wrong EXIF/ICC, "
        "LAB, float: reject or right"
    ),
)
def images(ctx: Ctx) -> Result:
    ims = hostile_images()
    g = png()
    src = ctx.table(
        "h.parquet",
        {
            "prompt": ["x"] * (len(ims) + 2),
            "image": [g, *ims.values(), g],
            "name": ["good", *ims, "good"],
        },
    )
    out = ctx.dir / "out"
    got = ctx.inproc(
        i2i(src, out, output__samples_per_shard=10, policy__reject_flat=False), timeout=240
    )[0]
    rows, rej = rows_of(out), rejects_of(out)
    v = ctx.cli("verify", out)
    made = [r["name"] for r in rows]
    must = {
        "bomb-header",
        "bomb-max",
        "zero",
        "eps",
        "svg",
        "pdf",
        "pickle",
        "gz",
        "zip",
        "html",
        "trunc",
        "float",
        "nul",
        "text",
        "ppm-huge",
        "bmp-huge",
    }
    wrong = [n for n in made if n in must]
    return (
        not got.get("error")
        and len(rows) + len(rej) == len(ims) + 2
        and made.count("good") == 2
        and not wrong
        and v.rc == 0
        and ctx.last_out.rss_mb < 2500,
        (
            f"{len(ims)} images: {len(rows) - 2} made, {len(rej)} rejected "
            f"{reasons_of(out)}, wrongly made {wrong}, verify {v.rc}, peak "
            f"{ctx.last_out.rss_mb:.0f} MB, {ctx.last_out.secs:.0f} s "
            f"{got.get('error', '')[:150]}"
        ),
    )
