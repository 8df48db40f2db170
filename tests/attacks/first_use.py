"""First use: runs, boxes, and what their first minutes say."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.attacks.context import Ctx
from tests.attacks.edits import i2i, png
from tests.attacks.kit import HELD, OTHER, Result, attack, slot
from tests.attacks.readers import markers_of, rows_of

TB = "Traceback"


@attack(
    "B2",
    "",
    {
        "B2-progress": (
            "progress says `starting`, 0 images, until the first shard (64 demo prompts at "
            "200 steps)"
        ),
        "B3-rates": "rates mix averages with start-up; a job that made no image has a rate",
    },
)
def b2(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(64)
    with slot():
        p = ctx.start(
            "run",
            "--input",
            src,
            "--output",
            ctx.dir / "o",
            "--steps",
            150,
            "--set",
            "resources.generate.max_replicas=1",
        )
        seen: list[tuple[float, str]] = []
        t = time.monotonic()
        last = ""
        while p.poll() is None and time.monotonic() - t < 240:
            time.sleep(0.5)
            lines = [
                x
                for x in p.log.read_text(errors="replace").replace("\r", "\n").splitlines()
                if x.strip()
            ]
            if lines and lines[-1] != last:
                last = lines[-1]
                seen.append((time.monotonic() - t, last))
        secs = time.monotonic() - t
    log = p.log.read_text(errors="replace")
    counts = sorted({int(m) for m in re.findall(r"\b(\d+)(?:/| of )64\b", log)})
    partial = [c for c in counts if 0 < c < 64]
    phases = [w for w in ("starting", "loading", "generating") if w in log.lower()]
    r["B2-progress"] = (
        len(partial) >= 2 and "loading" in phases,
        (
            f"{secs:.0f} s, {len(seen)} changes of the line, image counts seen "
            f"{counts[:9]}, phases {phases}; last lines: "
            f"{' / '.join(x for _, x in seen[-3:])[:160]}"
        ),
    )
    end = "\n".join(log.strip().splitlines()[-6:])
    both = re.search(r"64 (images|samples) in .*?\d+ ?s.*?/s.*?(after|start)", end, re.S)
    nul = ctx.table("n.parquet", {"prompt": pa.array([None] * 200, pa.string())})
    o = ctx.cli("run", "--input", nul, "--output", ctx.dir / "o2", "--steps", 1)
    rates = [m for m in re.findall(r"([\d.]+) ?(?:images)?/s", o.text) if float(m) > 0]
    r["B3-rates"] = (
        bool(both) and not rates,
        f"end: {end[-220:]!r}; all rejected: rates shown {rates[:4]}",
    )
    return r


@attack(
    "B6-boxes",
    (
        "boxes are carried untouched while the image is cropped and scaled; nothing "
        "recorded (seen only)"
    ),
)
def b6(ctx: Ctx) -> Result:
    src = ctx.table(
        "b.parquet",
        {
            "prompt": ["x"],
            "image": [png(size=(160, 96))],
            "objects": [{"bbox": [[32.0, 19.2, 96.0, 57.6]]}],
        },
    )
    ctx.inproc(i2i(src, ctx.dir / "o"))
    row = rows_of(ctx.dir / "o")[0]
    new = [
        k
        for k in row
        if any(w in k for w in ("crop", "source_width", "scale_x", "affine", "geometry"))
    ]
    return (
        OTHER if not new else HELD,
        (
            f"objects {row.get('objects')}, conditioning {row.get('conditioning')!r}, "
            f"columns of geometry {new}"
        ),
    )


@attack(
    "B7",
    "",
    {
        "B7-reasons": (
            "all rejected: green to the end, reasons never printed (end, status, --json, "
            "batchgen rejects)"
        ),
        "B7-early": "an all-rejected job of many shards stops early",
        "new-B7-mixed": (
            "rejects under the limit: reasons still told; first shards bad but the rest "
            "good with a limit of 0.5 (must not stop wrongly)"
        ),
    },
)
def b7(ctx: Ctx) -> Result:
    r = {}
    nul = ctx.table("n.parquet", {"prompt": pa.array([None] * 400, pa.string())})
    out = ctx.dir / "o"
    o = ctx.cli(
        "run",
        "--input",
        nul,
        "--output",
        out,
        "--steps",
        1,
        "--samples-per-shard",
        8,
        "--set",
        "resources.generate.max_replicas=1",
    )
    s = ctx.cli("status", out)
    j = ctx.cli("status", out, "--json")
    rj = ctx.cli("rejects", out)
    said = {
        "run": "null-prompt" in o.text,
        "status": "null-prompt" in s.text,
        "json": "null-prompt" in j.text,
        "rejects": rj.rc == 0 and "null-prompt" in rj.text,
    }
    try:
        json.loads(j.out)
    except ValueError:
        said["json"] = False
    ex = "e.g. n-000000" in o.text
    r["B7-reasons"] = (
        all(said.values()) and ex and o.rc == 2,
        f"rc {o.rc}, told by {said}, an example row: {ex}; {o.msg(160)}",
    )
    n = len(markers_of(out))
    r["B7-early"] = (o.rc == 2 and 0 < n < 45, f"{n} of 50 shards gone through, rc {o.rc}")
    mix = ctx.table("m.parquet", {"prompt": pa.array([None] * 24 + ["a"] * 40, pa.string())})
    a = ctx.cli(
        "run",
        "--input",
        mix,
        "--output",
        ctx.dir / "m",
        "--steps",
        1,
        "--samples-per-shard",
        8,
        "--set",
        "policy.rejected_limit=0.5",
        "--set",
        "resources.generate.max_replicas=1",
    )
    n = len(rows_of(ctx.dir / "m"))
    r["new-B7-mixed"] = (
        a.rc == 0 and n == 40 and "null-prompt" in a.text,
        f"rc {a.rc}, {n} of 40 made, reason told: {'null-prompt' in a.text}; {a.msg(120)}",
    )
    return r


def overwritten(ctx: Ctx, out: Path, src: Path, r: dict[str, Any]) -> None:
    c = ctx.cli(
        "run",
        "--input",
        src,
        "--output",
        out,
        "--steps",
        1,
        "--seed",
        5,
        "--overwrite",
        timeout=120,
        input=b"n\n",
    )
    n1 = len(rows_of(out))
    d = ctx.cli(
        "run",
        "--input",
        src,
        "--output",
        out,
        "--steps",
        1,
        "--seed",
        5,
        "--overwrite",
        timeout=120,
        input=b"y\n",
    )
    if d.rc and "--yes" in d.text:
        d = ctx.cli(
            "run",
            "--input",
            src,
            "--output",
            out,
            "--steps",
            1,
            "--seed",
            5,
            "--overwrite",
            "--yes",
            timeout=120,
        )
    v = ctx.cli("verify", out)
    job = (out / "_batchgen/job.yaml").read_text()
    r["B9-overwrite"] = (
        c.rc != 0 and n1 == 4 and d.rc == 0 and v.rc == 0 and "seed: 5" in job,
        (
            f"answer n: rc {c.rc}, rows kept {n1}; answer y: rc {d.rc}, verify {v.rc}, seed "
            f"5 in job.yaml {'seed: 5' in job}; {d.msg(120)}"
        ),
    )


@attack(
    "B9",
    "",
    {
        "B9-frozen": (
            "a spec that proved wrong (LoRA of another base) freezes the output although "
            "nothing was made"
        ),
        "B9-overwrite": "--overwrite begins anew after asking",
        "B9-status-last": "status tells how the last run ended",
    },
)
def b9(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(4)
    import numpy as np
    from safetensors.numpy import save_file

    lora = ctx.dir / "lora"
    lora.mkdir()
    save_file(
        {
            (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
            ): np.zeros((4, 999), "float32"),
            (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"
            ): np.zeros((999, 4), "float32"),
        },
        str(lora / "pytorch_lora_weights.safetensors"),
    )
    out = ctx.dir / "o"
    a = ctx.cli(
        "run",
        "--input",
        src,
        "--output",
        out,
        "--steps",
        1,
        "--set",
        f"model.loras=[{{path: {lora}, name: x}}]",
    )
    s = ctx.cli("status", out)
    planned = (out / "_batchgen/plan.json").exists()
    b = ctx.cli("run", "--input", src, "--output", out, "--steps", 1)
    n = len(rows_of(out))
    r["B9-frozen"] = (
        a.rc == 1 and b.rc == 0 and n == 4 and not a.tb and not b.tb,
        f"first rc {a.rc} (plan there: {planned}), second rc {b.rc}, {n} made; {b.msg(150)}",
    )
    told = any(w in s.text for w in ("ended", "failed", "LoRA", "lora")) and (
        "lora" in s.text.lower() or "x" == "y"
    )
    r["B9-status-last"] = (told or not planned, f"status rc {s.rc}: {s.text.strip()[:300]}")
    overwritten(ctx, out, src, r)
    return r
