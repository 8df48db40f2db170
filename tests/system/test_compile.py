"""torch.compile: pixels near to eager ones; compiled once, for all shards, processes, layouts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import codecache, config

from batchgen.models import artifacts, compiling
from batchgen.models.tiny import BUILDERS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.records import ConditionBatch
from batchgen.storage import open_store
from tests import compiled_process
from tests.added_files import build_lora, named
from tests.compile_cache import kept
from tests.family_stages import Array, FamilyStages, batch, call, picture
from tests.outputs import digests_of

__all__ = ["kept"]  # a fixture
TASK = "text-to-image"
WARMED = re.compile(
    r"a replica of the (\w+) pool on \S+ warmed up in \d+ s: (\d+) compiled functions, "
    r"(\d+) from the cache of compiled code, (\d+|none) newly compiled"
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[TASK, "stable-diffusion"](tmp_path_factory.mktemp("model"))


def graphs() -> int:
    """How many functions torch has captured, to compile them or to find them in its cache."""
    return int(counters["stats"]["unique_graphs"])


def levels(one: Array, other: Array) -> int:
    """The largest difference of two images."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def python(*words: str, **environment: str) -> str:
    """Run a new process without the caches of this one; returns all that it prints."""
    own = (artifacts.SHARED, artifacts.KEPT_BY_TORCH)
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def test_a_second_process_starts_from_the_saved_code(tmp_path: Path, folder: Path) -> None:
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    given = {"MODEL": str(folder), "BATCHGEN_CACHE": str(cache)}

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


@pytest.mark.parametrize("how", ["regional", "full"])
def test_pixels_are_near_and_nothing_compiles_twice(folder: Path, how: str) -> None:
    eager, compiled = FamilyStages(folder, TASK), FamilyStages(folder, TASK, compiled=how)
    whole = batch([0, 1, 2], call())
    made = compiled.fused(whole).pixels
    assert graphs() == 2  # the denoiser, or all its blocks, which share one; and the decoder
    assert made.std() > 5 and levels(made, eager.fused(whole).pixels) <= 1
    others: list[ConditionBatch] = [
        batch([2], call()),  # the tail of a shard
        batch([0, 1, 2], call(num_inference_steps=5, guidance_scale=7.0)),
        batch([0, 1, 2], call(scheduler="DPMSolverMultistepScheduler")),
    ]
    for other in others:
        assert levels(compiled.fused(other).pixels, eager.fused(other).pixels) <= 1
    assert graphs() == 2
    assert np.array_equal(compiled.fused(others[0]).pixels[0], made[2])  # whatever its neighbours
    assert np.array_equal(compiled.staged(whole).pixels, made)
    assert graphs() == 2
    unguided = batch([0, 1, 2], call(guidance_scale=1.0))
    assert levels(compiled.fused(unguided).pixels, eager.fused(unguided).pixels) <= 1
    assert graphs() == 3
    compiled.fused(whole)
    assert graphs() == 3
    assert not counters["graph_break"]


def test_images_arrive_in_one_layout(folder: Path) -> None:
    """The VAE's encoder gives latents channel by channel or pixel by pixel, as a kernel likes."""
    shared = call(strength=0.7)
    pictures = {"image": [picture(number) for number in range(3)]}
    eager, compiled = (
        FamilyStages(folder, "image-to-image", compiled=how) for how in (None, "regional")
    )
    whole = batch([0, 1, 2], shared, pictures)
    one = batch([1], shared, {"image": pictures["image"][1:2]})
    assert not compiled.encode(whole).conditions["image"].is_contiguous()
    made = compiled.fused(whole).pixels
    count = graphs()
    assert levels(made, eager.fused(whole).pixels) <= 1
    assert np.array_equal(compiled.staged(whole).pixels, made)
    assert np.array_equal(compiled.fused(one).pixels[0], made[1])
    assert graphs() == count


@pytest.mark.parametrize("how", ["regional", "full"])
def test_switching_loras_compiles_nothing(folder: Path, tmp_path: Path, how: str) -> None:
    files = {
        name: build_lora(folder, tmp_path / name, seed, config={"r": 2 * seed, "lora_alpha": 3})
        for seed, name in enumerate(("ink", "oil"), 1)
    }
    loras = named(files)
    eager = FamilyStages(folder, TASK, **loras)
    compiled = FamilyStages(folder, TASK, compiled=how, **loras)
    used: list[tuple[tuple[str, float], ...]] = [
        *((("ink", 1.0), ("oil", 1.0)), (("ink", 0.5),), (("oil", -2.0),), ()),
        (("ink", 0.5), ("oil", 0.25)),
    ]
    made = []
    for lora in used:
        given = batch([0, 1, 2], call(lora=lora))
        made.append(compiled.fused(given).pixels)
        assert levels(made[-1], eager.fused(given).pixels) <= 1, lora
        assert graphs() == 2
    assert all(levels(one, other) > 5 for one, other in pairwise(made))
    plain = FamilyStages(folder, TASK).fused(batch([0, 1, 2], call())).pixels
    assert levels(made[used.index(())], plain) <= 1


def test_code_quantized_by_torchao_compiles(folder: Path) -> None:
    pytest.importorskip("torchao")
    asked = {"quantization": {"backend": "torchao", "components": ["unet"]}}
    eager, compiled = (FamilyStages(folder, TASK, compiled=how, **asked) for how in (None, "full"))
    given = batch([0, 1, 2], call())
    assert levels(compiled.fused(given).pixels, eager.fused(given).pixels) <= 1
    assert graphs() == 2


def test_kernels_are_not_chosen_by_measuring_in_any_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's configuration belongs to a thread, and Ray calls a replica in several."""
    chosen = []
    hashed = codecache.compiled_fx_graph_hash

    def spy(*args: Any, **kwargs: Any) -> Any:
        chosen.append(config.deterministic)
        return hashed(*args, **kwargs)

    monkeypatch.setattr(codecache, "compiled_fx_graph_hash", spy)
    stages = FamilyStages(folder, TASK, batch_size=2, compiled="regional")  # not compiled before
    stages.fused(batch([0, 1], call()))
    assert chosen == [True, True]
    other = Thread(target=stages.fused, args=(batch([0, 1], call(guidance_scale=1.0)),))
    other.start()
    other.join()
    assert chosen == [True, True, True] and graphs() == 3


class Sine(torch.nn.Module):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given.sin()


def test_many_shapes_are_possible() -> None:
    settings = compiling._settings()
    del settings["options"]  # those of the compiler, which is left out here
    module = Sine()
    module.compile(**settings, backend="eager")
    for size in range(1, 12):  # torch's own limit is 8
        module(torch.zeros(size))
    assert graphs() == 11
