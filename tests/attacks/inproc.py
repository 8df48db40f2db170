"""Run specs through the checkout's own in-process stream; print one @@ line for each."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from batchgen.spec.build import build
from batchgen.spec.tree import merge
from tests.in_process import stream


def peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def streamed(dotted: dict[str, Any]) -> dict[str, Any]:
    """Nothing, or the error with which the stream of a spec ended."""
    try:
        stream(build(merge({}, dotted)))
    except BaseException as error:
        bases = [each.__name__ for each in type(error).__mro__]
        return {"type": type(error).__name__, "error": str(error)[:1500], "bases": bases}
    return {}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    exec(job.get("extra") or "", {"sys": sys})
    torch.set_num_threads(1)
    for dotted in job["specs"]:
        for _ in range(job["times"]):
            before = peak_mb()
            found = streamed(dotted)
            print("@@" + json.dumps(found | {"rss": [before, peak_mb()]}), flush=True)


if __name__ == "__main__":
    main()
