"""torch.compile: what is refused, and where compiled code is kept; nothing is compiled here."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchgen import models, runner
from batchgen.errors import InputError, ModelError
from batchgen.models import artifacts, compiling
from batchgen.models.tiny import BUILDERS
from batchgen.spec.build import build
from tests.added_files import build_lora, named
from tests.compile_cache import kept
from tests.datasets_on_disk import write_prompts
from tests.family_stages import FamilyStages, batch, call

__all__ = ["kept"]  # a fixture
TASK = "text-to-image"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[TASK, "stable-diffusion"](tmp_path_factory.mktemp("model"))


def test_a_lora_that_cannot_be_switched_off_is_refused(folder: Path, tmp_path: Path) -> None:
    file = build_lora(folder, tmp_path / "dora", 1, config={"r": 2, "use_dora": True})
    with pytest.raises(ModelError, match=r"model\.loras: one is a DoRA .* resources\.compile"):
        FamilyStages(folder, TASK, compiled="full", **named({"one": file}))


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


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "config", SimpleNamespace())
    with pytest.raises(ModelError, match=r"resources\.compile: torch .* install a newer one"):
        compiling._settings()


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


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """What torch was given to load; it would save ``code``."""
    loaded: list[bytes] = []
    monkeypatch.setenv(artifacts.KEPT_BY_TORCH, str(tmp_path / "kept"))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))

    def load(data: bytes) -> object | None:
        loaded.append(data)
        return object() if data == b"code" else None  # as torch, which only logs that it failed

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return loaded


def test_the_first_replica_saves_and_the_others_load(
    code: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, ran = tmp_path / "shared", []

    def found(**facts: int) -> str:
        return artifacts.warmed(facts, "cpu", lambda: ran.append(facts)).shared

    assert found(size=1) == "" and not shared.exists()
    monkeypatch.setenv(artifacts.SHARED, str(shared))
    assert found(size=1) == f"saved to {shared}" and code == []
    assert found(size=1) == f"loaded from {shared}" and code == [b"code"]
    assert found(size=2) == f"saved to {shared}"
    assert [one["size"] for one in ran] == [1, 1, 1, 2]
    assert len(list(shared.glob("*.bin"))) == 2
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    assert found(size=3) == ""

    def another_saves_first() -> tuple[bytes, None]:
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"other", None))
        assert artifacts._save(str(shared), "key") == f"saved to {shared}"
        return b"code", None

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", another_saves_first)
    assert artifacts._save(str(shared), "key") == f"another replica saved it to {shared}"
    assert (shared / "key.bin").read_bytes() == b"other"


@pytest.mark.usefixtures("code")
def test_damaged_code_is_not_said_to_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    monkeypatch.setenv(artifacts.SHARED, str(shared))

    def found() -> str:
        return artifacts.warmed({}, "cpu", lambda: None).shared

    assert found() == f"saved to {shared}"
    (file,) = shared.glob("*.bin")
    file.write_bytes(b"co")
    assert (
        found()
        == f"not loaded: {file.name} in {shared} is damaged; remove it, and it is saved again"
    )
    file.unlink()
    assert [found(), found()] == [f"saved to {shared}", f"loaded from {shared}"]


def test_torch_tells_damaged_code_from_good() -> None:
    assert torch.compiler.load_cache_artifacts(b"co") is None


def test_shared_code_that_cannot_be_read_or_saved(
    code: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readable, ran = tmp_path / "readable", []
    readable.mkdir()
    (readable / "_batchgen").write_text("")  # where a store puts its temporary files
    monkeypatch.setenv(artifacts.SHARED, str(readable))
    found = artifacts.warmed({}, "cpu", lambda: ran.append(1))
    assert found.shared.startswith("not saved: cannot create ")
    monkeypatch.setenv(artifacts.SHARED, "nosuch://place")
    with pytest.raises(InputError, match="nosuch"):
        artifacts.warmed({}, "cpu", lambda: ran.append(2))
    assert ran == [1]


def test_the_folder_of_code_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path))
    monkeypatch.delenv(artifacts.KEPT_BY_TORCH, raising=False)
    artifacts.choose_folder()
    made = tmp_path / "compiled"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert os.environ[artifacts.KEPT_BY_TORCH] == str(made)
    for place, mode in ((made, 0o770), (tmp_path, 0o777)):
        before = place.stat().st_mode
        place.chmod(mode)
        monkeypatch.delenv(artifacts.KEPT_BY_TORCH, raising=False)
        with pytest.raises(ModelError, match="can be changed by other users"):
            artifacts.choose_folder()
        place.chmod(before)
    monkeypatch.setenv(artifacts.KEPT_BY_TORCH, str(tmp_path / "chosen"))
    artifacts.choose_folder()
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
