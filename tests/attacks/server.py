"""Fork server: runs commands and streams of one checkout in forked children, imports done."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import runpy
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

IMPORTS = (
    *("torch", "pyarrow.parquet", "yaml", "numpy", "PIL.Image", "click", "pydantic", "fsspec"),
    *("batchgen.cli", "diffusers", "transformers", "tests.in_process"),
)
DIFFUSERS = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "AutoencoderKL"),
    *("UNet2DConditionModel", "DPMSolverMultistepScheduler"),
)


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def load() -> None:
    """All that a child needs, once; what this checkout lacks is told."""
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:
            say(warn=repr(error))
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in DIFFUSERS:
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)


def settle(q: dict[str, Any]) -> None:
    """The child's files, folder, environment and limit are those that were asked for."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(q.get("i") or "/dev/null", os.O_RDONLY), 0)
    for number, name in ((1, "o"), (2, "e")):
        os.dup2(os.open(q[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(q["cwd"])
    os.environ.update(q["env"])
    if q.get("limit_gb"):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (int(size + q["limit_gb"] * 2**30),) * 2)


def child(q: dict[str, Any]) -> None:
    settle(q)
    code = 0
    try:
        if q["kind"] == "cli":
            sys.argv = ["batchgen", *q["argv"]]
            from batchgen.cli import main

            main()
        else:
            script = Path(__file__).with_name("inproc.py")
            sys.argv = [str(script), *q["argv"]]
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)


def reap(children: dict[int, int]) -> None:
    while children:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        code = os.waitstatus_to_exitcode(status)
        say(n=children.pop(pid, -1), rc=code, rss=usage.ru_maxrss / 1024)


def main() -> None:
    load()
    children: dict[int, int] = {}
    say(ready=os.getpid())
    waiting = b""
    while True:
        if select.select([0], [], [], 0.03)[0]:
            got = os.read(0, 1 << 20)
            if not got:
                return
            waiting += got
            while b"\n" in waiting:
                line, _, waiting = waiting.partition(b"\n")
                q = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    child(q)
                children[pid] = q["n"]
                say(started=pid, n=q["n"])
        reap(children)


if __name__ == "__main__":
    main()
