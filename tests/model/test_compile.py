"""torch.compile: pixels near to eager ones, compiled once, and what is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from batchgen import models, runner
from batchgen.errors import InputError, ModelError
from batchgen.models import artifacts, compiling
from batchgen.models.tiny import BUILDERS
from batchgen.records import ConditionBatch
from batchgen.spec.build import build
from tests.added_files import build_lora, named
from tests.datasets_on_disk import write_prompts
from tests.family_stages import Array, FamilyStages, batch, call

TASK = "text-to-image"


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Torch's cache of compiled code, which the tests of this file share."""
    folder = tmp_path_factory.mktemp("compiled")
    deterministic = torch._inductor.config.deterministic
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHGEN_CACHE", str(folder))
        patch.delenv(artifacts.KEPT_BY_TORCH, raising=False)
        patch.delenv(artifacts.SHARED, raising=False)
        yield folder
    torch._inductor.config.deterministic = deterministic
    os.environ.pop(artifacts.KEPT_BY_TORCH, None)


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


def test_a_lora_that_cannot_be_switched_off_is_refused(folder: Path, tmp_path: Path) -> None:
    file = build_lora(folder, tmp_path / "dora", 1, config={"r": 2, "use_dora": True})
    with pytest.raises(ModelError, match=r"model\.loras: one is a DoRA .* resources\.compile"):
        FamilyStages(folder, TASK, compiled="full", **named({"one": file}))


def test_code_quantized_by_torchao_compiles(folder: Path) -> None:
    pytest.importorskip("torchao")
    asked = {"quantization": {"backend": "torchao", "components": ["unet"]}}
    eager, compiled = (FamilyStages(folder, TASK, compiled=how, **asked) for how in (None, "full"))
    given = batch([0, 1, 2], call())
    assert levels(compiled.fused(given).pixels, eager.fused(given).pixels) <= 1
    assert graphs() == 2


def spec_of(folder: Path, how: str | None = "full", **model: Any) -> Any:
    return build(
        {
            "input": {"path": "in.parquet"},
            "output": {"url": "out"},
            "model": {"path": str(folder), **model},
            "resources": {"compile": how},
        }
    )


def test_what_cannot_be_compiled_is_refused_while_planning(folder: Path, tmp_path: Path) -> None:
    info = models.inspect(spec_of(folder).model, TASK)
    models.check_compile(spec_of(folder), info)
    asked = {"backend": "bitsandbytes_4bit", "components": ["unet"]}
    with pytest.raises(ModelError, match="weights that bitsandbytes_4bit quantized cannot be"):
        models.check_compile(spec_of(folder, quantization=asked), info)
    models.check_compile(spec_of(folder, None, quantization=asked), info)
    text = {"quantization": {**asked, "components": ["text_encoder"]}}
    models.check_compile(spec_of(folder, **text), info)  # it is not compiled
    other = BUILDERS[TASK, "z-image"](tmp_path / "model")
    source = write_prompts(tmp_path / "in.parquet", 2)
    given = {"path": str(source)}, {"url": str(tmp_path / "out")}
    spec = build({"input": given[0], "output": given[1], "model": str(other)})
    assert runner.plan_job(spec).rows == 2
    spec = spec.model_copy(
        update={"resources": spec.resources.model_copy(update={"compile": "full"})}
    )
    with pytest.raises(
        ModelError, match=r"^resources\.compile: a z-image .* length of the prompts"
    ):
        runner.plan_job(spec)


def test_a_model_without_repeated_blocks_is_compiled_as_a_whole(tmp_path: Path) -> None:
    upscaler = BUILDERS["super-resolution", "latent-upscaler"](tmp_path / "model")
    stages = FamilyStages(upscaler, "super-resolution", compiled="regional")
    unet = stages.denoise.pipeline.unet
    assert unet._repeated_blocks and unet._compiled_call_impl is not None


def test_an_error_of_the_compiler_names_the_field(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = FamilyStages(folder, TASK, compiled="full")
    forward = type(stages.denoise.pipeline.unet).forward

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(stages.denoise.pipeline.unet), "forward", breaks)
    said = r"resources\.compile: a model cannot be compiled on this machine: .*graph_break"
    with pytest.raises(ModelError, match=said), compiling.compile_errors("a model"):
        stages.fused(batch([0, 1, 2], call()))


def test_shared_code_that_cannot_be_read_or_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(artifacts.KEPT_BY_TORCH, str(tmp_path / "kept"))
    readable = tmp_path / "readable"
    readable.mkdir()
    (readable / "_batchgen").write_text("")  # where a store puts its temporary files
    monkeypatch.setenv(artifacts.SHARED, str(readable))
    ran = []

    def compiles() -> None:
        ran.append(torch.compile(torch.sin)(torch.ones(3)))

    found = artifacts.warmed({}, "cpu", compiles)
    assert ran and found.shared.startswith("not saved: cannot create ")
    monkeypatch.setenv(artifacts.SHARED, "nosuch://place")
    with pytest.raises(InputError, match="nosuch"):
        artifacts.warmed({}, "cpu", compiles)
    assert len(ran) == 1


def test_the_folder_of_code_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path))
    monkeypatch.delenv(artifacts.KEPT_BY_TORCH, raising=False)
    artifacts.set_up()
    made = tmp_path / "compiled"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert os.environ[artifacts.KEPT_BY_TORCH] == str(made)
    assert torch._inductor.config.deterministic
    for place, mode in ((made, 0o770), (tmp_path, 0o777)):
        before = place.stat().st_mode
        place.chmod(mode)
        monkeypatch.delenv(artifacts.KEPT_BY_TORCH, raising=False)
        with pytest.raises(ModelError, match="can be changed by other users"):
            artifacts.set_up()
        place.chmod(before)
    monkeypatch.setenv(artifacts.KEPT_BY_TORCH, str(tmp_path / "chosen"))
    artifacts.set_up()
    assert os.environ[artifacts.KEPT_BY_TORCH] == str(tmp_path / "chosen")


def test_one_replica_compiles_at_a_time(tmp_path: Path) -> None:
    with artifacts._one_at_a_time(tmp_path, "key"):
        script = (
            "import sys; from pathlib import Path; from batchgen.models import artifacts\n"
            "print('waits', flush=True)\n"
            "with artifacts._one_at_a_time(Path(sys.argv[1]), sys.argv[2]): print('has it')"
        )
        others = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path), key],
                stdout=subprocess.PIPE,
                text=True,
            )
            for key in ("key", "other")
        ]
        assert others[1].communicate()[0].split("\n")[1] == "has it"
        assert others[0].stdout is not None and others[0].stdout.readline() == "waits\n"
        with pytest.raises(subprocess.TimeoutExpired):
            others[0].wait(0.5)
    assert others[0].communicate()[0] == "has it\n"
