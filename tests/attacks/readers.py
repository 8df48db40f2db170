"""Readers of an output, written from docs/output.md with plain pyarrow, tarfile and json."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def rows_of(out: Path) -> list[dict]:
    """Accepted samples: dictionaries of columns, with ``_bytes`` for the image's file."""
    found = []
    for f in sorted((out / "data").rglob("*.parquet")) if (out / "data").is_dir() else []:
        t = pq.read_table(f)
        try:
            listed = t.to_pylist()
        except ValueError:  # struct with equal field names
            listed = t.drop_columns(
                [x.name for x in t.schema if pa.types.is_struct(x.type) and x.name != "image"]
            ).to_pylist()
        for r in listed:
            found.append({**r, "_bytes": (r.get("image") or {}).get("bytes"), "_file": f.name})
    for f in sorted((out / "data").rglob("*.tar")):
        with tarfile.open(f) as t:
            parts: dict[str, dict[str, bytes]] = {}
            for m in t.getmembers():
                stem, _, ext = m.name.partition(".")
                parts.setdefault(stem, {})[ext] = t.extractfile(m).read()
        for stem, p in parts.items():
            r = json.loads(p["json"]) if "json" in p else {}
            found.append(
                {
                    "key": stem,
                    **r,
                    "_bytes": next((p[e] for e in ("png", "jpg", "webp") if e in p), None),
                    "_file": f.name,
                    "_stem": stem,
                }
            )
    for f in sorted((out / "data").rglob("metadata.jsonl")):
        for line in f.read_text().splitlines():
            r = json.loads(line)
            p = f.parent / r["file_name"]
            found.append(
                {
                    **r,
                    "_bytes": p.read_bytes() if p.is_file() else None,
                    "_file": str(p.relative_to(out)),
                }
            )
    return found


def rejects_of(out: Path) -> list[dict]:
    return [
        r
        for f in sorted((out / "_batchgen" / "rejects").glob("*.parquet"))
        for r in pq.read_table(f).to_pylist()
    ]


def markers_of(out: Path) -> dict[str, dict]:
    return {
        f.name: json.loads(f.read_text())
        for f in sorted((out / "_batchgen" / "shards").glob("*.json"))
    }


def reasons_of(out: Path) -> dict[str, int]:
    d: dict[str, int] = {}
    for r in rejects_of(out):
        d[r["reason"]] = d.get(r["reason"], 0) + 1
    return d


def pixels(b: bytes) -> str:
    im = Image.open(io.BytesIO(b)).convert("RGB")
    return hashlib.sha256(repr(im.size).encode() + im.tobytes()).hexdigest()


def oracle(out: Path, keys: set[str] | None = None) -> str:
    """Nothing when every image decodes and has its sha256, and the keys are these, each once."""
    seen = []
    for r in rows_of(out):
        if not r["_bytes"]:
            return f"{r.get('key')}: no image"
        if hashlib.sha256(r["_bytes"]).hexdigest() != r["sha256"]:
            return f"{r['key']}: wrong bytes"
        try:
            pixels(r["_bytes"])
        except Exception as e:
            return f"{r['key']}: {e}"
        seen.append(r["key"])
    if len(seen) != len(set(seen)):
        return "a key twice"
    if keys is not None:
        all_keys = set(seen) | {r["key"] for r in rejects_of(out)}
        if all_keys != keys:
            return f"{len(keys - all_keys)} missing, {len(all_keys - keys)} extra"
    tmp = [f for f in out.rglob("*") if f.is_file() and ("tmp" in f.relative_to(out).parts)]
    return f"temporary files: {tmp[:2]}" if tmp else ""


def tree_of(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }
