"""Compiled code is made once: other processes, machines, layouts and shards find it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchgen.models import artifacts
from batchgen.models.tiny import BUILDERS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests import compiled_process
from tests.outputs import digests_of

WARMED = re.compile(
    r"a replica of the (\w+) pool on \S+ warmed up in \d+ s: (\d+) compiled functions, "
    r"(\d+) from the cache of compiled code, (\d+|none) newly compiled"
)


def python(*words: str, **environment: str) -> str:
    """Run a new process without the caches of this one; returns all that it prints."""
    own = (artifacts.SHARED, artifacts.KEPT_BY_TORCH)
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def test_a_second_process_starts_from_the_saved_code(tmp_path: Path) -> None:
    model = BUILDERS["text-to-image", "stable-diffusion"](tmp_path / "model")
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    given = {"MODEL": str(model), "BATCHGEN_CACHE": str(cache)}

    def process(**more: str) -> dict[str, Any]:
        """What a replica compiles on a machine whose torch has no compiled functions.

        Its libraries of C++ code are kept, whose headers take 20 s: graphs and kernels are found by
        the folders that are deleted.
        """
        for name in ("fxgraph", "aotautograd"):
            shutil.rmtree(cache / "compiled" / name, ignore_errors=True)
        lines = python(compiled_process.__name__, **given, **more).splitlines()
        (line,) = (one for one in lines if one.startswith('{"seconds"'))
        found: dict[str, Any] = json.loads(line)
        return found

    first = process(**{artifacts.SHARED: str(shared)})
    assert (first["graphs"], first["fresh"]) == (2, 2) and first["shared"] == f"saved to {shared}"
    assert [one.suffix for one in shared.iterdir() if one.is_file()] == [".bin"]
    second = process(**{artifacts.SHARED: str(shared)})
    assert (second["graphs"], second["fresh"]) == (2, 0)
    assert second["shared"] == f"loaded from {shared}"
    without = process()
    assert (without["graphs"], without["fresh"], without["shared"]) == (2, 2, "")
    for each in (first, second, without):
        assert each["after"] == 2, "a shard compiled again"
        assert each["pixels"] == first["pixels"]


@pytest.mark.long
def test_runs_on_ray_compile_once(prompts: Callable[..., Path], tmp_path: Path) -> None:
    source, cache = prompts(7), tmp_path / "cache"
    kept = cache / "compiled" / "fxgraph"

    def run(name: str, **settings: Any) -> list[tuple[str, ...]]:
        words = [f"--set={key.replace('__', '.')}={value}" for key, value in settings.items()]
        words += ["--set=output.samples_per_shard=3", "--set=resources.batch_size=2"]
        places = ("--input", str(source), "--output", str(tmp_path / name), "--steps", "2")
        said = python("batchgen", "run", *places, *words, BATCHGEN_CACHE=str(cache))
        assert verify(Ledger(open_store(str(tmp_path / name)))).ok
        return WARMED.findall(said)

    assert run("eager") == [] and not kept.exists()
    assert run("fused", resources__compile="full") == [("generate", "2", "0", "2")]
    files = sorted(one.name for one in kept.rglob("*"))
    assert len([one for one in kept.glob("*/*")]) == 2, "only the warm-up compiles"
    staged = run("staged", resources__compile="full", resources__layout="staged")
    assert sorted(staged) == [("decode", "1", "1", "none"), ("denoise", "1", "1", "none")]
    assert sorted(one.name for one in kept.rglob("*")) == files
    assert digests_of(tmp_path / "fused") == digests_of(tmp_path / "staged")
