"""Section 8: wrong options, spec files and model folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

import yaml

from tests.attacks.context import Ctx
from tests.attacks.kit import PY, Result, attack, ok_err

BASE8 = ["plan", "--input", "p.parquet", "--output", "o"]


CASES8 = {
    "date": [*BASE8, "--set", "sampling.negative_prompt=2024-13-45"],
    "0x": [*BASE8, "--set", "seed=0x_"],
    "digits": [*BASE8, "--set", "seed=" + "9" * 5000],
    "60s": [*BASE8, "--set", "seed=1:2:3_"],
    "make-foo": [
        *BASE8,
        "--task",
        "image-to-image",
        "--image-column",
        "prompt",
        "--set",
        "conditioning.make.image.name=canny",
        "--set",
        "conditioning.make.image.foo=1",
    ],
    "model-5000": [*BASE8, "--model", "m" * 5000],
    "ftp": ["plan", "--input", "ftp://127.0.0.1:1/x.parquet", "--output", "o"],
    "sftp": ["plan", "--input", "sftp://127.0.0.1:1/x.parquet", "--output", "o"],
    "deep-set": [*BASE8, "--set", "seed=" + "[" * 3000],
    "deep-set2": [*BASE8, "--set", "seed=" + "[" * 900 + "]" * 900],
    "self": [*BASE8, "--set", "resources=&a {b: *a}"],
    "date-key": [*BASE8, "--set", "storage_options={2024-01-01: {a: 1}}"],
    "int-key": [*BASE8, "--set", "storage_options={s3: {1: 2}}"],
    "model-nul": [*BASE8, "--model", "a\\0b"],
    "dots": [*BASE8, "--set", "..=1"],
    "empty": [*BASE8, "--set", "=1"],
    "binary": [*BASE8, "--set", "seed=!!binary aGk="],
    "set-tag": [*BASE8, "--set", "seed=!!set {a}"],
    "omap": [*BASE8, "--set", "seed=!!omap [a: 1]"],
    "ts": [*BASE8, "--set", "seed=2024-01-01T00:00:00Z"],
    "inf": [*BASE8, "--set", "sampling.guidance_scale=.inf"],
    "merge": [*BASE8, "--set", "resources={<<: 5}"],
    "list-index": [*BASE8, "--set", "model.loras.0.path=x"],
    "shards": [*BASE8, "--set", "output.samples_per_shard=1e400"],
    "url-odd": ["plan", "--input", "http://[", "--output", "o"],
    "proto": ["plan", "--input", "://x", "--output", "o"],
    "proto2": ["plan", "--input", "nope://x", "--output", "o"],
    "glob": ["plan", "--input", "[", "--output", "o"],
    "glob2": ["plan", "--input", "**" * 40, "--output", "o"],
    "empty-in": ["plan", "--input", "", "--output", "o"],
    "empty-out": ["plan", "--input", "p.parquet", "--output", ""],
    "long-in": ["plan", "--input", "x" * 9000, "--output", "o"],
    "tilde": ["plan", "--input", "~nobodyhere/x.parquet", "--output", "o"],
    "dir-spec": ["plan", "."],
    "hf": ["plan", "--input", "hf://x", "--output", "o"],
    "gs": ["plan", "--input", "gs://x/y.parquet", "--output", "o"],
    "github": ["plan", "--input", "github://x", "--output", "o"],
    "zip": ["plan", "--input", "zip://x::y.zip", "--output", "o"],
    "memory": ["plan", "--input", "memory://x", "--output", "o"],
}


def yaml_bombs(ctx: Ctx, file: Any, fine: Any, r: dict[str, Any]) -> None:
    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    o = file("bomb.yaml", bomb)
    o2 = file(
        "bomb2.yaml",
        "a: &a {x: 1, y: 2}\n"
        + "".join(
            (
                f"{chr(98 + i)}: &{chr(98 + i)} {{p: *{chr(97 + i)}, q: *{chr(97 + i)}, r: "
                f"*{chr(97 + i)}, s: *{chr(97 + i)}}}\n"
            )
            for i in range(14)
        ),
    )
    o3 = ctx.cli(
        *BASE8,
        "--set",
        "resources="
        + "{a: &a [1,1,1,1,1,1,1,1,1], "
        + ", ".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)
        )
        + "}",
        timeout=25,
        limit_gb=8,
    )
    r["8-yaml-bomb"] = (
        all(fine(x) and len(x.text) < 5000 for x in (o, o2, o3)),
        "; ".join(
            (
                f"rc {x.rc}{' HANG (bounded at 25 s)' if x.timed_out else ''}"
                f"{' TB' if x.tb else ''} {x.secs:.1f} s, {len(x.text)} letters"
            )
            for x in (o, o2, o3)
        ),
    )


def odd_file_name(ctx: Ctx, r: dict[str, Any]) -> None:
    d = ctx.dir / "xf"
    d.mkdir()
    shutil.copy(ctx.dir / "p.parquet", os.path.join(os.fsencode(d), b"\xff.parquet"))
    o = ctx.cli("plan", "--input", d, "--output", "o")
    o2 = ctx.cli("plan", "--input", d, "--output", "o", "--json")
    o3 = ctx.cli("run", "--input", d, "--output", ctx.dir / "xo", "--steps", 1)
    r["8-xff"] = (
        not o.tb and not o2.tb and not o3.tb and o.rc in (0, 1) and o3.rc in (0, 1),
        (
            f"plan rc {o.rc}{' TRACEBACK ' + o.last[:60] if o.tb else ''}, --json rc "
            f"{o2.rc}{' TB' if o2.tb else ''}, run rc {o3.rc}{' TB' if o3.tb else ''} "
            f"{o.msg(80) if o.rc else ''}"
        ),
    )


def counts(ctx: Ctx, r: dict[str, Any]) -> None:
    tiny = ctx.dir / "tiny"
    ctx.cli("models", "make-tiny", "class-to-image", tiny, heavy=True)
    res = {
        n: ctx.cli(
            "plan",
            "--count",
            n,
            "--output",
            "o",
            "--task",
            "class-to-image",
            "--model",
            tiny,
            timeout=25,
            limit_gb=8,
        )
        for n in ("10000000000000", "1000000000000000", "9" * 30)
    }
    if any("class" in o.text and o.rc == 1 and o.secs < 3 for o in res.values()):
        res = {
            n: ctx.cli(
                "plan",
                "--count",
                n,
                "--output",
                "o",
                "--task",
                "unconditional",
                "--model",
                "digits-shapes",
                timeout=25,
                limit_gb=8,
            )
            for n in res
        }
    r["8-count"] = (
        all(
            not o.timed_out and not o.tb and o.rc in (0, 1) and "MemoryError" not in o.text
            for o in res.values()
        ),
        "; ".join(
            f"1e{len(n) - 1}: {'HANG' if o.timed_out else o.rc}{' TB' if o.tb else ''} {o.msg(90)}"
            for n, o in res.items()
        ),
    )


def dated_jobs(ctx: Ctx, r: dict[str, Any]) -> None:
    seen, good = [], True
    for d in ("sampling: {negative_prompt: 2024-13-45}\n", "storage_options: {s3: {1: 2}}\n"):
        out = ctx.base(name=f"j{len(seen)}")
        j = out / "_batchgen/job.yaml"
        t = yaml.safe_load(j.read_text())
        text = yaml.safe_dump({k: v for k, v in t.items() if k not in d}) + d
        j.write_text(text)
        o = ctx.cli("resume", out)
        good &= not o.tb
        seen.append(f"rc {o.rc}{' TRACEBACK ' + o.last[:60] if o.tb else ''} {o.msg(90)}")
    r["8-job-date"] = (good, "; ".join(seen))


def odd_spec_files(ctx: Ctx, file: Any, fine: Any, r: dict[str, Any]) -> None:
    os.mkfifo(ctx.dir / "fifo.yaml")
    res = {
        n: file(f"n-{n}.yaml", d)
        for n, d in {
            "bin": bytes(range(256)),
            "utf16": "input: {path: p.parquet}".encode("utf-16"),
            "empty": b"",
            "tabs": b"input:\n\tpath: x\n",
            "two": b"input: {path: p}\n---\na: 1\n",
            "py": b"!!python/object/apply:os.system ['touch /tmp/pwned']\n",
            "big": b"a: x\n" * 5_000_000,
        }.items()
    }
    fifo = os.open(ctx.dir / "fifo.yaml", os.O_RDWR)  # for writing alone it would wait
    with subprocess.Popen(["yes", "a: x"], stdout=fifo) as endless:
        res["fifo"] = ctx.cli("plan", ctx.dir / "fifo.yaml", timeout=20)
        endless.kill()
    os.close(fifo)
    res["zero"] = ctx.cli("plan", "/dev/zero", timeout=20, limit_gb=4)
    r["new-8-files"] = (
        all(fine(o) for n, o in res.items() if n != "utf16") and res["utf16"].rc == 0,
        "; ".join(
            f"{n} rc {o.rc}{' HANG' if o.timed_out else ''}{' TB ' + o.last[:40] if o.tb else ''}"
            for n, o in res.items()
            if not fine(o) and n != "utf16"  # with its mark it is YAML
        )
        or "9 kinds: refused in words",
    )


@attack(
    "8",
    "",
    {
        **{f"8-{k}": "plan " + " ".join(v)[:80] for k, v in CASES8.items()},
        "8-file-deep": "spec file of deep nesting, self-reference, date as key, wrong date",
        "8-yaml-bomb": "YAML bomb (nine aliases deep, 400 B)",
        "8-xff": "input file named \\xff.parquet",
        "8-count": "--count 1e13 hangs, 1e15 MemoryError",
        "8-job-date": "job.yaml with a wrong date or {s3: {1: 2}}: resume",
        "new-8-files": (
            "spec files: binary, UTF-16, empty, a FIFO, /dev/zero, 50 MB, tabs, two "
            "documents, !!python"
        ),
    },
)
def a8(ctx: Ctx) -> Result:
    r = {}
    ctx.prompts(4)
    for k, args in CASES8.items():
        args = [a.replace("\\0", "\x01") for a in args]
        o = ctx.cli(*args, timeout=30, limit_gb=8)
        good = (
            (ok_err(o) and o.rc == 1)
            or (o.rc == 0 and not o.tb and k in ("date", "int-key", "list-index", "model-nul"))
            or (
                ok_err(o) and o.rc == 3 and k in ("ftp", "sftp")
            )  # nobody answers there: go on later
        )
        r[f"8-{k}"] = (
            good,
            (
                f"{'HANG ' if o.timed_out else ''}rc "
                f"{o.rc}{' TRACEBACK ' + o.last[:80] if o.tb else ''}; {len(o.text)} "
                f"letters; {o.msg(110)}"
            ),
        )

    def file(name: str, data: Any) -> Any:
        f = ctx.dir / name
        f.write_bytes(data if isinstance(data, bytes) else data.encode())
        return ctx.cli("plan", f, "--input", "p.parquet", "--output", "o", timeout=25, limit_gb=8)

    def fine(o: Any) -> Any:
        return ok_err(o) and o.rc == 1

    res = {
        n: file(f"{n}.yaml", d)
        for n, d in {
            "deep": "a: " + "[" * 5000,
            "deep2": "input: " + "[" * 800 + "]" * 800,
            "self": "resources: &a {b: *a}\n",
            "datekey": "2024-01-01: 1\n",
            "wrongdate": "sampling: {negative_prompt: 2024-13-45}\n",
            "intkey": "1: 2\n",
            "nullkey": "~: 1\n",
            "listkey": "? [a]\n: 1\n",
        }.items()
    }
    r["8-file-deep"] = (
        all(fine(o) or (n == "wrongdate" and o.rc == 0) for n, o in res.items()),
        "; ".join(
            (
                f"{n} rc {o.rc}{' HANG' if o.timed_out else ''}"
                f"{' TRACEBACK ' + o.last[:50] if o.tb else ''}"
            )
            for n, o in res.items()
        ),
    )
    yaml_bombs(ctx, file, fine, r)
    odd_file_name(ctx, r)
    counts(ctx, r)
    dated_jobs(ctx, r)
    odd_spec_files(ctx, file, fine, r)
    return r


@attack(
    "8-model-config",
    (
        "model folders: native size above 4096 or 0; config mutations (300 random ones); "
        "weight_map a list"
    ),
)
def a8m(ctx: Ctx) -> Result:

    src = ctx.prompts(2)
    home = ctx.dir / "tiny"
    o = ctx.cli("models", "make-tiny", "text-to-image", home, heavy=True)
    if o.rc:
        return "error", o.text[-200:]
    script = ctx.dir / "mutate.py"
    script.write_text("""
import json, random, sys, shutil, os, traceback
from pathlib import Path
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen import runner
from batchgen.errors import BatchgenError
home, src, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng = random.Random(5)
files = [p for p in home.rglob("*.json") if p.stat().st_size < 30000]
texts = {p: p.read_text() for p in files}
vals = [None, 0, -1, 1, 5000, 2**70, 1.5, "", "x", "../..", [], [1], {}, {"a": 1}, True, [None],
    "os.system", ["os", "system"], float("nan")]
bad, slow = {}, 0
import time
def keys(t, pre=()):
    for k, v in (t.items() if isinstance(t, dict) else enumerate(t) if isinstance(t, list) else ()):
        yield (*pre, k); yield from keys(v, (*pre, k))
cases = [(p, k, v) for p in files for k in list(keys(json.loads(texts[p]))) for v in vals]
rng.shuffle(cases)
sized = [p for p in files if "sample_size" in texts[p]]
special = [(p, ("sample_size",), v) for p in sized for v in (0, 5000, -8, "x")]
done = 0
for p, path, v in special + cases[:n]:
    t = json.loads(texts[p]); d = t
    for k in path[:-1]: d = d[k]
    d[path[-1]] = v
    p.write_text(json.dumps(t)); t0 = time.time()
    try:
        dotted = {"input.path": src, "output.url": "o", "model.path": str(home)}
        runner.plan_job(build(merge({}, dotted)))
    except BatchgenError: pass
    except Exception as e:
        where = f"{p.parent.name}/{p.name} {'.'.join(map(str, path))}={str(v)[:12]}"
        bad.setdefault(f"{type(e).__name__} {where}", str(e)[:60])
    slow += time.time() - t0 > 10
    p.write_text(texts[p]); done += 1
print(json.dumps({"done": done, "slow": slow, "bad": bad}))
""")
    o = ctx.exec([PY, script, home, src, 600], heavy=True, timeout=300)
    try:
        j = json.loads(o.out.strip().splitlines()[-1])
    except Exception:
        return "error", o.text[-300:]
    wm = ctx.dir / "wm"
    shutil.copytree(home, wm)
    for s in (wm / "unet").glob("*.safetensors"):
        s.unlink()
    (wm / "unet/diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    o2 = ctx.cli("plan", "--input", src, "--output", "o", "--model", wm, heavy=True)
    return (
        not j["bad"] and not j["slow"] and not o2.tb,
        (
            f"{j['done']} mutations, {len(j['bad'])} escape as other errors, {j['slow']} "
            f"over 10 s; weight_map a list: rc {o2.rc}{' TRACEBACK' if o2.tb else ''}; "
            f"{'; '.join(list(j['bad'])[:4])}"
        ),
    )
