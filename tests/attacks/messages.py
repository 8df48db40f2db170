"""First use: messages, errors in actors, and `batchgen doctor`."""

from __future__ import annotations

import contextlib
import re
import signal
from typing import Any

import pyarrow as pa
import yaml

from tests.attacks.context import Ctx
from tests.attacks.edits import png
from tests.attacks.kit import OTHER, PY, Result, attack, slot
from tests.attacks.processes import wait_until
from tests.attacks.readers import markers_of, rows_of


@attack(
    "B15",
    "",
    {
        "B15a-readonly": (
            "read-only disk: 'free some space, then resume' for an output never planned"
        ),
        "B15b-at-work": "status while a run is at work says resume",
        "B15c-report": "report of a finished job with rejects above the limit says 'Not complete.'",
        "B15d-limit": (
            "run OUT/_batchgen/job.yaml --set policy.rejected_limit=0.5 ok, status still exits 2"
        ),
        "B15e-holder": "the lease's holder is a riddle",
    },
)
def b15(ctx: Ctx) -> Result:
    r = {}
    src = ctx.prompts(4)
    m = ctx.dir / "ro"
    m.mkdir()
    script = (
        f"mount -t tmpfs -o size=20m tmpfs {m} && mount -o remount,ro {m} && exec {PY} -m "
        f"batchgen run --input {src} --output {m}/out2 --steps 1"
    )
    o = ctx.exec(["unshare", "-m", "bash", "-c", script], heavy=True)
    r["B15a-readonly"] = (
        o.rc in (1, 3) and not o.tb and "free some space" not in o.text and "resume" not in o.text,
        f"rc {o.rc}; {o.msg(250)}",
    )
    big = ctx.prompts(800, name="big.parquet")
    out = ctx.dir / "w"
    with slot():
        p = ctx.start(
            "run",
            "--input",
            big,
            "--output",
            out,
            "--steps",
            8,
            "--samples-per-shard",
            8,
            "--set",
            "resources.generate.max_replicas=1",
        )
        wait_until(
            lambda: (out / "_batchgen/shards").exists() and len(markers_of(out)) >= 1, 300, p
        )
        s = ctx.cli("status", out)
        b = ctx.cli("resume", out, heavy=False)
        pid = p.pid
        p.send_signal(signal.SIGINT)
        with contextlib.suppress(Exception):
            p.wait(60)
    r["B15b-at-work"] = (
        "continue with" not in s.text and "is working on" in s.text,
        f"rc {s.rc}: {s.text.strip()[-200:]}",
    )
    r["B15e-holder"] = (
        b.rc == 1
        and f"pid {pid}" in b.text
        and "a3c6" not in b.text
        and not re.search(r"[0-9a-f]{8}-\d{6,}", b.text),
        f"{b.msg(250)}",
    )
    mix = ctx.table("m.parquet", {"prompt": pa.array([None] * 3 + ["a"] * 13, pa.string())})
    out = ctx.dir / "rej"
    a = ctx.cli("run", "--input", mix, "--output", out, "--steps", 1)
    html = (
        (out / "_batchgen/report.html").read_text()
        if (out / "_batchgen/report.html").exists()
        else ""
    )
    r["B15c-report"] = (
        a.rc == 2 and "Not complete" not in html and bool(html),
        f"rc {a.rc}, report says 'Not complete': {'Not complete' in html}; {a.msg(130)}",
    )
    c = ctx.cli("run", out / "_batchgen/job.yaml", "--set", "policy.rejected_limit=0.5")
    s = ctx.cli("status", out)
    rs = ctx.cli("resume", out)
    r["B15d-limit"] = (
        c.rc == 0 and s.rc == 0 and rs.rc == 0,
        f"run rc {c.rc}, status rc {s.rc}, resume rc {rs.rc}; {s.last[:120]}",
    )
    return r


def plain_words(ctx: Ctx, r: dict[str, Any]) -> None:
    words = (
        "valid tuple",
        "valid dictionary",
        "instance of",
        "a value is required",
        "Input should",
        "pydantic",
        "Field required",
        "unable to parse",
        "type=",
    )
    f = {
        "loras": {"model": {"loras": "/x/lora"}},
        "columns": {"input": {"path": "p.parquet", "columns": "x"}},
        "none": {"input": None},
        "int": {"variants": "many"},
        "bool": {"input": {"path": "p.parquet", "check_keys": "perhaps"}},
        "float": {"sampling": {"guidance_scale": "strong"}},
        "range": {"variants": 0},
        "list": {"output": {"url": ["a"]}},
        "enum": {"output": {"url": "o", "format": "zip"}},
        "resources": {"resources": [1]},
        "extra": {"foo": 1},
    }
    bad, n = [], 0
    for k, t in f.items():
        t = {"input": {"path": "p.parquet"}, "output": {"url": "o"}, **t}
        p = ctx.dir / f"{k}.yaml"
        p.write_text(yaml.safe_dump(t))
        o = ctx.cli("plan", p)
        n += 1
        hit = [w for w in words if w in o.text]
        if hit or o.rc != 1 or o.tb:
            bad.append(f"{k}: {hit or o.rc} {o.msg(80)}")
    o = ctx.cli("doctor")
    o2 = ctx.cli("plan")
    if "a value is required" in o.text + o2.text or "got None" in o.text + o2.text:
        bad.append("no input: " + o2.msg(90))
    r["10-pydantic"] = (not bad, "; ".join(bad) or f"{n} faults in plain words")


@attack(
    "B18",
    "",
    {
        "B18-silent": (
            "settings without effect (--strength, control_scale, noise_level for "
            "text-to-image) are taken in silence"
        ),
        "10-task": "forgotten --task: the message suggests --task image-to-image",
        "10-pydantic": "pydantic wording in messages",
        "10-all": "all faults of a spec at once",
        "10-strings": "input: path, model: id, output: url as plain strings",
        "10-status-name": "status NAME of a relative folder is taken for a submission id",
        "new-10-more": (
            "more silent settings: guidance with class columns, ip scale, denoising_end, "
            "conditioning.resize for text-to-image, quality for png, jpeg_subsampling for "
            "webp"
        ),
    },
)
def b18(ctx: Ctx) -> Result:
    r = {}
    ctx.prompts(4)
    ctx.table("i.parquet", {"prompt": ["a"], "image": [png()]})
    B = ["plan", "--input", "p.parquet", "--output", "o"]
    res = {
        k: ctx.cli(*B, *v)
        for k, v in {
            "strength": ["--strength", "0.5"],
            "control_scale": ["--set", "sampling.control_scale=0.5"],
            "noise_level": ["--set", "sampling.noise_level=5"],
        }.items()
    }
    r["B18-silent"] = (
        all(o.rc == 1 and not o.tb for o in res.values()),
        "; ".join(f"{k} rc {o.rc}" for k, o in res.items()) + f"; {res['strength'].msg(100)}",
    )
    res = {
        k: ctx.cli(*B, *v)
        for k, v in {
            "image_guidance": ["--set", "sampling.image_guidance_scale=2"],
            "ip": ["--set", "sampling.image_prompt_scale=0.5"],
            "end": ["--set", "sampling.denoising_end=0.5"],
            "resize": ["--set", "conditioning.resize=fit"],
            "quality-png": ["--set", "output.image_quality=50"],
            "subsampling-webp": [
                "--image-format",
                "webp",
                "--set",
                "output.jpeg_subsampling=4:2:0",
            ],
            "uri": ["--set", "input.uri_timeout_s=5"],
            "guidance": ["--set", "sampling.eta=0.5"],
        }.items()
    }
    r["new-10-more"] = (OTHER, "; ".join(f"{k} rc {o.rc}" for k, o in res.items()))
    o = ctx.cli("plan", "--input", "i.parquet", "--output", "o", "--image-column", "image")
    r["10-task"] = (o.rc == 1 and "--task image-to-image" in o.text, o.msg(200))
    plain_words(ctx, r)
    p = ctx.dir / "many.yaml"
    p.write_text(
        yaml.safe_dump(
            {
                "input": {"path": "p.parquet", "colums": {}},
                "output": {"url": "o", "format": "zip"},
                "variants": 0,
                "sampling": {"guidance_scale": "strong"},
            }
        )
    )
    o = ctx.cli("plan", p)
    told = [w for w in ("colums", "format", "variants", "guidance_scale") if w in o.text]
    r["10-all"] = (len(told) == 4 and o.rc == 1, f"told {told} of 4; {o.text.strip()[:150]}")
    p = ctx.dir / "plain.yaml"
    p.write_text("input: p.parquet\nmodel: digits-shapes\noutput: o\n")
    o = ctx.cli("plan", p)
    r["10-strings"] = (o.rc == 0, f"rc {o.rc} {o.msg(150) if o.rc else ''}")
    ctx.base(name="demo")
    o = ctx.cli("status", "demo")
    o2 = ctx.cli("status", "nothere")
    r["10-status-name"] = (
        o.rc == 0 and "8265" not in o.text and "submission" not in o.text.lower(),
        (
            f"rc {o.rc}: {o.text.strip()[:160]}; nothere: rc "
            f"{o2.rc}{' TB' if o2.tb else ''} {o2.msg(120)}"
        ),
    )
    return r


@attack(
    "10-actor", "a SpecError raised in an actor becomes a TypeError (exit 3); in a reader exit 3"
)
def a10(ctx: Ctx) -> Result:
    o = ctx.exec(
        [
            PY,
            "-c",
            """
import pickle, inspect
from batchgen import errors
bad = []
for n, c in vars(errors).items():
    if inspect.isclass(c) and issubclass(c, errors.BatchgenError):
        for args in ((), ("a",), ("a", "b"), ("a", "b", "c")):
            try: e = c(*args)
            except TypeError: continue
            try:
                f = pickle.loads(pickle.dumps(e))
                if str(f) != str(e) or type(f) is not type(e): bad.append(f"{n} differs")
            except Exception as x: bad.append(f"{n}: {type(x).__name__}")
        # as Ray makes of it: a class of both
try:
    from ray.exceptions import RayTaskError
    e = errors.SpecError("field", "given", "allowed")
    t = RayTaskError("f", "tb", e).as_instanceof_cause()
    if "field" not in str(t.cause): bad.append("cause without its message: " + str(t.cause)[:60])
except Exception as x: bad.append(f"as_instanceof_cause {type(x).__name__}: {x}")
print(bad)
""",
        ]
    )
    return o.out.strip() == "[]", o.out.strip() or o.err[-200:]


@attack(
    "11-gpu",
    (
        "a GPU that Ray claims and torch cannot see: the job runs on the CPU in silence, "
        "exit 0 (local Ray with RAY num_gpus)"
    ),
)
def a11(ctx: Ctx) -> Result:
    src = ctx.prompts(4)
    script = ctx.dir / "g.py"
    script.write_text(f"""
import ray, sys, subprocess, os
ctx = ray.init(num_gpus=1, num_cpus=2, include_dashboard=False, log_to_driver=False,
    object_store_memory=200 << 20)
from batchgen.cli import main
sys.argv = ["batchgen", "run", "--input", {str(src)!r}, "--output", {str(ctx.dir / "o")!r}]
sys.argv += ["--steps", "1", "--address", ray.get_runtime_context().gcs_address]
import atexit
main()
""")
    o = ctx.exec([PY, script], heavy=True, timeout=150)
    n = len(rows_of(ctx.dir / "o"))
    return (
        o.rc not in (0,) and n == 0 and not o.timed_out and "GPU" in o.text and "torch" in o.text,
        f"rc {o.rc}{' TIMEOUT' if o.timed_out else ''}, {n} made, {o.secs:.0f} s; {o.msg(250)}",
    )


@attack(
    "B16",
    "",
    {
        "B16-doctor-regions": (
            "doctor 'ok' for an image column of plain captions (100 % rejected later)"
        ),
        "B16-doctor-alone": "`batchgen doctor` alone: input: got None (missing feature: seen only)",
        "7-doctor-exposure": "doctor says what is open",
    },
)
def b16(ctx: Ctx) -> Result:
    r = {}
    src = ctx.table("c.parquet", {"prompt": ["a"] * 8, "image": ["a nice caption of a cat"] * 8})
    o = ctx.cli(
        "doctor",
        "--task",
        "image-to-image",
        "--input",
        src,
        "--image-column",
        "image",
        "--output",
        ctx.dir / "o",
        timeout=180,
    )
    r["B16-doctor-regions"] = (
        o.rc != 0 or "reject" in o.text.lower() or "missing-uri" in o.text,
        f"rc {o.rc}; {o.text.strip()[-220:]}",
    )
    o2 = ctx.cli("doctor", timeout=120)
    r["B16-doctor-alone"] = (OTHER, f"rc {o2.rc} {o2.msg(150)}")
    r["7-doctor-exposure"] = (
        any(words in o2.text for words in ("open ports", "Ray's token")),
        f"rc {o2.rc}; {o2.text.strip()[-300:]}",
    )
    return r
