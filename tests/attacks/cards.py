"""First use: cards, snippets, logs and memory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.attacks.context import Ctx
from tests.attacks.edits import spec
from tests.attacks.kit import BROKEN, OTHER, PY, Result, attack


def loads_of(ctx: Ctx, counts: Any, fmt: str, out: Path, snip: Any) -> Any:
    """What the card's snippet and the datasets library load, in place and moved."""
    copy = ctx.dir / f"moved-{fmt}"
    shutil.copytree(out, copy)
    code = (snip[0] if snip else "raise SystemExit('no snippet')") + (
        "\nprint('ROWS', len(list(images)) if 'images' in dir() else [len(v) for "
        "k, v in list(globals().items()) if hasattr(v, '__len__') and hasattr(v, "
        "'column_names')])\n"
    )
    res = {}
    for where, cwd in (("in place", out), ("copy", copy)):
        x = ctx.exec(
            [PY, "-c", code],
            cwd=cwd,
            env={
                "HF_HOME": str(ctx.dir / "hf"),
                "HF_DATASETS_CACHE": str(ctx.dir / f"hfc-{fmt}-{where[:2]}"),
            },
            timeout=120,
        )
        m = re.search(r"ROWS \[?(\d+)", x.out)
        res[where] = int(m.group(1)) if m else x.last[:80]
    whole = ctx.exec(
        [
            PY,
            "-c",
            (
                f"import datasets; d = datasets.load_dataset({str(copy)!r}); "
                f"print('ROWS', sum(len(x) for x in d.values()), list(d))"
            ),
        ],
        env={"HF_DATASETS_CACHE": str(ctx.dir / f"hfw-{fmt}")},
        timeout=120,
    )
    m = re.search(r"ROWS (\d+)(.*)", whole.out)
    res["load_dataset(OUT)"] = int(m.group(1)) if m else whole.last[:80]
    if fmt == "image-folder":
        y = ctx.exec(
            [
                PY,
                "-c",
                (
                    f"import datasets; d = datasets.load_dataset('imagefolder', "
                    f"data_dir={str(out / 'data')!r}, split='train'); print('ROWS', "
                    f"len(d))"
                ),
            ],
            env={"HF_DATASETS_CACHE": str(ctx.dir / "hfd")},
            timeout=120,
        )
        counts["old snippet"] = y.out.strip()[-20:]
    return res


def card_faults(ctx: Ctx, card: Any, cats: Any, r: dict[str, Any]) -> None:
    head = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    tc = set(head.get("task_categories") or [])
    faults = []
    if not tc <= cats:
        faults.append(f"categories {tc - cats}")
    if str(ctx.dir) in card:
        faults.append("local path in card")
    if re.search(r"\bNone\b|\bnull\b", card):
        faults.append("nulls")
    if "contact-sheet.png" not in card:
        faults.append("no picture")
    if not ("validation" in card and "dev-set" in card):
        faults.append("labels not counted")
    for w in ("image_guidance_scale", "denoising_end", "noise_level"):
        if w in card:
            faults.append(w)
    r["B19-card"] = (not faults, f"{tc}; {faults}")


def logs_and_sheet(ctx: Ctx, r: dict[str, Any]) -> None:
    out = ctx.dir / "o-parquet"
    logs = ctx.cli("logs", out)
    c = ctx.cli("cancel", out)
    n = ctx.cli("logs", ctx.dir / "nothere")
    r["B24-logs"] = (
        "8265" not in logs.text and "8265" not in c.text and not n.tb and n.rc != 0,
        (
            f"logs rc {logs.rc}: {logs.text.strip()[:90]!r}; cancel rc {c.rc}: "
            f"{c.text.strip()[:120]!r}; nothere rc {n.rc} {n.msg(80)}"
        ),
    )
    src = ctx.table(
        "e.parquet",
        {
            "prompt": [
                "a 🦊 in snow 🎿",
                "قطة حمراء على السطح",
                "Donaudampfschifffahrtsgesellschaftskapitänswitwenversicherung" * 3,
                "红色的圆形",
                "a\nb\nc\nd\ne\nf\ng\nh",
                "👩‍👩‍👧‍👦",
                "हिन्दी चित्र",
                "\u202eevil rtl",
            ]
        },
    )
    o = ctx.cli("run", "--input", src, "--output", ctx.dir / "sheet", "--steps", 1)
    p = ctx.dir / "sheet/_batchgen/contact-sheet.png"
    r["B-sheet"] = (OTHER if p.exists() else BROKEN, f"rc {o.rc}; look at {p}")


@attack(
    "B19",
    "",
    {
        "B19-card": (
            "card: task_categories that the Hub does not know, local paths, nulls, no "
            "picture, no label counts"
        ),
        "5-folder-trap": (
            "the load that card and docs show loses samples whose label or key holds "
            "train, test, val, dev, eval (each format)"
        ),
        "12-demo-line": "without --model: one line that the 32x32 demo model is used",
        "B24-logs": "local logs and cancel complain about a job server",
        "B-sheet": "contact sheet: emoji, Arabic, long words: no tofu, no overlap (looked at)",
    },
)
def b19(ctx: Ctx) -> Result:
    r = {}
    labels = [
        "train",
        "test",
        "val",
        "dev",
        "eval",
        "validation",
        "training",
        "a",
        "testing",
        "dev-set",
        "x_test",
        "b",
    ]
    src = ctx.table(
        "l.parquet",
        {
            "prompt": [f"a red circle {i}" for i in range(12)],
            "label": labels,
            "id": [f"{label}/{i}" for i, label in enumerate(labels)],
        },
    )
    cats = {
        "text-to-image",
        "image-to-image",
        "unconditional-image-generation",
        "image-to-video",
        "image-feature-extraction",
        "image-classification",
        "object-detection",
        "image-segmentation",
        "zero-shot-image-classification",
        "other",
    }
    seen, good, card, counts = [], True, "", {}
    for fmt in ("image-folder", "webdataset", "parquet"):
        out = ctx.dir / f"o-{fmt}"
        o = ctx.cli(
            "run",
            "--input",
            src,
            "--output",
            out,
            "--steps",
            1,
            "--label-column",
            "label",
            "--key-column",
            "id",
            "--samples-per-shard",
            6,
            "--set",
            f"output.format={fmt}",
        )
        text = (out / "README.md").read_text() if (out / "README.md").exists() else ""
        snip = re.findall(r"```python\n(.*?)```", text, re.S)
        res = loads_of(ctx, counts, fmt, out, snip)
        g = res["in place"] == 12 and res["copy"] == 12 and res["load_dataset(OUT)"] == 12
        good &= g
        seen.append(f"{fmt}: {res}")
        card = card or text
        if fmt == "parquet":
            card = text
        if fmt == "image-folder":
            r["12-demo-line"] = (
                o.rc == 0
                and "32" in o.text
                and ("demo model" in o.text.lower() or "no --model" in o.text.lower()),
                (o.text.strip()[:220]),
            )
    r["5-folder-trap"] = (good, "; ".join(seen))
    card_faults(ctx, card, cats, r)
    logs_and_sheet(ctx, r)
    return r


@attack(
    "13-memory",
    (
        "actors grow 35 MB per 10,000 samples with unique prompts after the cache is full "
        "(short: cache made small by long prompts; slope over 6,000, in-process)"
    ),
)
def a13(ctx: Ctx) -> Result:
    src = ctx.table(
        "u.parquet", {"prompt": [f"a red circle number {i} on blue" for i in range(9000)]}
    )
    extra = (
        r"""
import threading, os, time
def _watch():
    import glob
    out = sys.argv[1] + ".rss"
    while True:
        try:
            n = len(glob.glob(OUT + "/_batchgen/shards/*.json"))
            rss = int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
            open(out, "a").write(f"{n} {rss:.1f}\n")
        except OSError: pass
        time.sleep(2)
"""
        + f"\nOUT = {str(ctx.dir / 'o')!r}\nthreading.Thread(target=_watch, daemon=True).start()\n"
    )
    got = ctx.inproc(
        spec(src, ctx.dir / "o", output__samples_per_shard=100, resources__batch_size=16),
        timeout=900,
        extra=extra,
    )
    pts = [
        tuple(map(float, line.split()))
        for f in ctx.dir.glob("*.rss")
        for line in f.read_text().splitlines()
    ]
    pts = [(n * 100, rss) for n, rss in pts if n > 0]

    def slope(lo: Any, hi: Any) -> Any:
        sel = [(n, r) for n, r in pts if lo <= n <= hi]
        if len(sel) < 4:
            return float("nan")
        mx = sum(n for n, _ in sel) / len(sel)
        my = sum(r for _, r in sel) / len(sel)
        return (
            sum((n - mx) * (r - my) for n, r in sel)
            / max(1e-9, sum((n - mx) ** 2 for n, _ in sel))
            * 10000
        )

    a, b = slope(500, 4500), slope(4500, 9000)
    return (
        OTHER,
        (
            f"{len(pts)} points to {max([n for n, _ in pts] or [0]):.0f} samples: {a:.0f} "
            f"MB/10k first half, {b:.0f} MB/10k second; {got[0].get('error', '')[:80]} "
            f"(cache of 256 MB not full by then in part)"
        ),
    )
