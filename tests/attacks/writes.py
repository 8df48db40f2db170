"""Section 1: outputs and commands that write outside of their folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from tests.attacks.context import Ctx
from tests.attacks.edits import retable, set_cell
from tests.attacks.kit import Result, attack
from tests.attacks.readers import rows_of


def outside(ctx: Ctx, *keep: Path) -> list[str]:
    """Files of the attack's folder that lie in none of these."""
    return [
        str(p.relative_to(ctx.dir))
        for p in ctx.dir.rglob("*")
        if p.is_file()
        and not any(k in p.parents for k in keep)
        and not p.name.startswith(("_o", "_e", "log", "specs"))
    ]


def members(folder: Path) -> list[str]:
    """The names within all tars below a folder."""
    found = []
    for each in folder.rglob("*.tar"):
        with tarfile.open(each) as tar:
            found += tar.getnames()
    return found


def evil_output(
    ctx: Ctx,
    path: str = "../../../../../escaped/cron.d/evil",
    key: Any = None,
    label: Any = None,
    body: bytes = b"* * * * * root touch /tmp/x\n",
    fmt: str = "parquet",
) -> Path:
    out = ctx.base()

    def edit(t: Any) -> Any:
        if path is not None:
            t = set_cell(t, "image", 0, {"bytes": body, "path": path})
            t = set_cell(t, "sha256", 0, hashlib.sha256(body).hexdigest())
        if key is not None:
            t = set_cell(t, "key", 0, key)
        if label is not None:
            t = set_cell(t, "label", 0, label)
        return t

    retable(out, edit)
    return out


@attack(
    "1.1",
    "",
    {
        "1.1-verify": "verify of an output whose row's image.path leaves the folder (cron file)",
        "1.1-image-folder": "export --format image-folder of it writes outside the target",
        "1.1-tar": "export to webdataset: member names from image.path and key",
        "new-1.1-absolute": (
            "the same with an absolute image.path and with a key ../../x and a label ../../../x"
        ),
    },
)
def a11(ctx: Ctx) -> Result:
    r = {}
    out = evil_output(ctx)
    o = ctx.cli("verify", out)
    r["1.1-verify"] = (o.rc == 4 and not o.tb, f"rc {o.rc}: {o.last}")
    target = ctx.dir / "a/b/c/d/target"
    o = ctx.cli("export", out, target, "--format", "image-folder")
    esc = outside(ctx, out, target)
    inside = [p for p in target.rglob("*") if p.is_file() and b"* * * *" in p.read_bytes()]
    r["1.1-image-folder"] = (
        not esc and not o.tb and o.rc != 0,
        f"rc {o.rc}, outside: {esc}, evil bytes inside: {len(inside)}; {o.msg()}",
    )
    tars = ctx.dir / "t/tars"
    o = ctx.cli("export", out, tars, "--format", "webdataset")
    names = members(tars / "data")
    bad = [n for n in names if "/" in n or ".." in n]
    r["1.1-tar"] = (
        not bad and not o.tb and o.rc != 0,
        f"rc {o.rc}, bad members: {bad[:3]}; {o.msg()}",
    )
    seen, good = [], True
    for n, kw in enumerate(
        [
            {"path": str(ctx.dir / "ABS/evil")},
            {"path": None, "key": "../../../../../../up-v0"},
            {"path": None, "label": "../../../../lab"},
            {"path": "x\\..\\..\\evil.png"},
            {"path": "CON"},
            {"path": "metadata.jsonl"},
        ]
    ):
        shutil.rmtree(ctx.dir / "out", ignore_errors=True)
        out = evil_output(ctx, **kw)
        v = ctx.cli("verify", out)
        tgt = ctx.dir / f"n{n}/b/c/d/target"
        e = ctx.cli("export", out, tgt, "--format", "image-folder")
        w = ctx.cli("export", out, ctx.dir / f"n{n}/b/w", "--format", "webdataset")
        esc = outside(
            ctx,
            out,
            target,
            tars,
            *[ctx.dir / f"n{k}" for k in range(n)],
            tgt,
            ctx.dir / f"n{n}/b/w",
        )
        names = members(ctx.dir / f"n{n}/b/w/data")
        bad = [x for x in names if "/" in x or ".." in x or "\\" in x]
        fine = (
            not esc
            and not bad
            and not e.tb
            and not w.tb
            and not v.tb
            and (v.rc == 4 or "label" in kw)
        )
        good &= fine
        seen.append(
            f"{list(kw.values())[-1]}: verify {v.rc}, export {e.rc}/{w.rc}, outside "
            f"{esc + bad}{' TRACEBACK' if e.tb or w.tb or v.tb else ''}"
        )
    r["new-1.1-absolute"] = (good, "; ".join(seen))
    return r


@attack(
    "new-1.2",
    "",
    {
        "new-1.2-marker-reads": (
            "a marker names ../victim or /etc/passwd: verify and export refuse, read nothing"
        ),
        "new-1.2-repair-deletes": (
            "verify --repair / resume --verify / clean of an output whose marker names "
            "../victim.txt does not touch it"
        ),
    },
)
def n12(ctx: Ctx) -> Result:
    r, seen, good = {}, [], True
    for name in ("../victim.txt", "/etc/passwd", "data/../../victim.txt"):
        shutil.rmtree(ctx.dir / "out", ignore_errors=True)
        out = ctx.base()
        victim = ctx.dir / "victim.txt"
        victim.write_text("mine")
        f = out / "_batchgen/shards/00000.json"
        m = json.loads(f.read_text())
        p = (out / name) if not name.startswith("/") else Path(name)
        b = p.read_bytes()
        m["files"].append(
            {"name": name, "bytes": len(b), "sha256": hashlib.sha256(b).hexdigest(), "rows": 0}
        )
        f.write_text(json.dumps(m))
        v = ctx.cli("verify", out)
        e = ctx.cli("export", out, ctx.dir / f"t{len(seen)}", "--format", "webdataset")
        good &= v.rc == 4 and not v.tb and e.rc != 0 and not e.tb
        seen.append(f"{name}: verify {v.rc}, export {e.rc}")
    r["new-1.2-marker-reads"] = (good, "; ".join(seen) + f"; {v.msg()}")
    m["files"][-1] = {"name": "../victim.txt", "bytes": 999, "sha256": "0" * 64, "rows": 0}
    f.write_text(json.dumps(m))
    a = ctx.cli("verify", out, "--repair", heavy=True, timeout=240)
    c = ctx.cli("clean", out)
    b = ctx.cli("verify", out)
    still = victim.exists() and victim.read_text() == "mine"
    r["new-1.2-repair-deletes"] = (
        still and not a.tb and not c.tb,
        f"repair rc {a.rc}, clean {c.rc}, verify after {b.rc}, victim there: {still}; {a.msg()}",
    )
    return r


@attack(
    "B1",
    "",
    {
        "B1-readme": "run --output into a folder with README.md and data/mine.txt",
        "new-B1-export": "export into a folder that holds a README.md",
        "new-B1-dot": "--output . in a git checkout",
        "new-B1-empty-ok": "an empty folder, and one with .DS_Store alone? (empty must work)",
        "new-B1-edited-card": "a card that its user has edited or replaced survives resume",
    },
)
def b1(ctx: Ctx) -> Result:
    r = {}

    def project(name: str) -> Any:
        p = ctx.dir / name
        (p / "data").mkdir(parents=True)
        (p / "README.md").write_text("# My precious project\n")
        (p / "data/mine.txt").write_text("hi")
        return p

    src = ctx.prompts(4)
    p = project("proj")
    o = ctx.cli("run", "--input", src, "--output", p, "--steps", 1)
    r["B1-readme"] = (
        o.rc == 1
        and (p / "README.md").read_text().startswith("# My precious")
        and "README.md" in o.text
        and not (p / "_batchgen").exists(),
        (
            f"rc {o.rc}, README {(p / 'README.md').read_text()[:12]!r}, _batchgen made: "
            f"{(p / '_batchgen').exists()}; {o.msg()}"
        ),
    )
    out = ctx.base()
    p = project("proj2")
    o = ctx.cli("export", out, p, "--format", "webdataset")
    r["new-B1-export"] = (
        o.rc == 1 and (p / "README.md").read_text().startswith("# My precious"),
        f"rc {o.rc}, README {(p / 'README.md').read_text()[:12]!r}; {o.msg()}",
    )
    p = ctx.dir / "git"
    (p / ".git").mkdir(parents=True)
    (p / ".git/HEAD").write_text("ref")
    (p / "README.md").write_text("# mine\n")
    (p / "setup.py").touch()
    o = ctx.cli("run", "--input", src, "--output", ".", "--steps", 1, cwd=p)
    r["new-B1-dot"] = (
        o.rc == 1 and (p / "README.md").read_text() == "# mine\n",
        f"rc {o.rc}; {o.msg()}",
    )
    p = ctx.dir / "empty"
    p.mkdir()
    o = ctx.cli("run", "--input", src, "--output", p, "--steps", 1)
    r["new-B1-empty-ok"] = (
        o.rc == 0 and len(rows_of(p)) == 4,
        f"rc {o.rc}, {len(rows_of(p))} rows; {o.msg()}",
    )
    (p / "README.md").write_text("# I wrote this card anew\n")
    o = ctx.cli("resume", p)
    r["new-B1-edited-card"] = (
        (p / "README.md").read_text() == "# I wrote this card anew\n",
        f"rc {o.rc}, README {(p / 'README.md').read_text()[:25]!r}; {o.msg()}",
    )
    return r
