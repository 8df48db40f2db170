"""benchmarks/gpu.py on a CPU: every section ends with a real result, and deadlines are kept."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks import gpu
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_job import summed

ROOT = Path(__file__).parents[2]
ORDER = ["machine", "families", "syncs", "bytes", "sd15", "sdxl", "flux", "jobs"]
ORDER += ["rivals", "memory"]
pytestmark = pytest.mark.long
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    results["said"] = done.stdout
    return results


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from texts(one)
    elif isinstance(value, str):
        yield value


def test_every_section_ends_and_nothing_in_it_fails(found: dict[str, Any]) -> None:
    sections = found["sections"]
    assert list(sections) == ORDER
    assert {one["state"] for one in sections.values()} == {"ended"}, found["said"]
    assert [text for text in texts(sections) if text.startswith("failed")] == []
    for name in ORDER:
        assert f"== {name}: ended" in found["said"]
    assert found["device"].startswith("CPU")
    assert found["torch"] and found["diffusers"] and found["date"]


def test_families_equal_the_plain_pipelines_in_both_layouts(found: dict[str, Any]) -> None:
    families = found["sections"]["families"]
    assert families["summary"]["planned"] == families["summary"]["ended"] == 3
    assert families["summary"]["plain"] == families["summary"]["staged"] == {"equal": 3}
    assert families["wrong"] == {}
    assert all(one["pixels"]["std"] > 5 for one in families["families"].values())


def test_waits_and_times_of_stages_are_counted(found: dict[str, Any]) -> None:
    syncs = found["sections"]["syncs"]
    assert syncs["waits"]["PNDM"]["a_step"]["read from cpu"] > 0
    for stage in ("encode", "denoise", "decode"):
        assert syncs["clocks"]["second"][stage]["device_ms"] > 0


def test_bytes_do_not_depend_on_process_place_or_neighbours(found: dict[str, Any]) -> None:
    same = found["sections"]["bytes"]
    assert len(set(same["first"]["sha"])) == 4
    for name in ("again", "other_places", "other_neighbours", "padded", "new_process"):
        assert same[name] == "equal"
    for name in ("staged_wire", "two_threads", "deterministic"):
        assert same[name] == "equal"
    assert same["float32_tf32_or_ieee"]["ieee"]["against_ieee"] == "equal"


def test_parts_have_rates(found: dict[str, Any]) -> None:
    for name in ("sd15", "sdxl", "flux"):
        section = found["sections"][name]
        assert section["matmul_tflops"] > 0
        assert section["eager_b2"]["tflops"] > 0
        assert section["vae_b1"]["nchw"]["ms_an_image"] > 0
        assert section["text"]["encoder_8_new_prompts_ms"] > 0
    assert found["sections"]["sd15"]["compiled_b2"]["largest_difference"] == 0
    assert found["sections"]["sd15"]["compiled_b2"]["vae"]["levels_from_eager"] == 0
    assert found["sections"]["flux"]["compiled_blocks_b1"]["largest_difference"] == 0


def test_jobs_write_all_images_without_ray(found: dict[str, Any]) -> None:
    jobs = found["sections"]["jobs"]
    assert jobs["ray_loaded"] is False
    for name, calls in (("sd15_20_steps", 3), ("sdxl_30_steps", 2), ("sdxl_4_steps", 2)):
        job = jobs[name]
        assert (job["images"], job["problems"], job["denoiser_calls"]) == (6, [], calls)
        assert job["bytes_an_image"] > 1000
        assert 0 < job["of_denoiser_limit"] < job["of_limit"]
        assert job["host_seconds_in_markers"]["denoise"] > 0
    assert jobs["sd15_gaps"]["stages"] == {"encode": 2, "denoise": 2, "decode": 2}


def test_rivals_run_and_memory_errors_are_described(found: dict[str, Any]) -> None:
    assert set(found["sections"]["rivals"]["batchgen_over"]) == {"batch_1", "batched", "arrays"}
    memory = found["sections"]["memory"]
    assert memory["decode"]["class"] == "RuntimeError"
    assert "memory" in memory["decode"]["text"]
    assert memory["decode_after_it"] == "equal"


# --- deadlines -----------------------------------------------------------------------------------


def end_of(monkeypatch: pytest.MonkeyPatch, folder: Path, what: Callable[[Bench], None]) -> Any:
    """What gpu.py says of a section that does this, with a deadline in half a second."""
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu, "function_of", lambda module, name: what)
    bench = Bench("cpu", False, folder, time.monotonic() + 0.5, folder / "part.json")
    return gpu.ended(gpu.SECTIONS[0], bench, "fork")


@forks
def test_a_section_is_cut_off_and_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow(bench: Bench) -> None:
        child = subprocess.Popen(["sleep", "600"])
        bench.note("first", child.pid)
        time.sleep(600)

    found = end_of(monkeypatch, tmp_path, slow)
    assert found["state"] == "cut off at its deadline after 1 s"
    state = Path(f"/proc/{found['first']}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # ended too


@forks
def test_a_section_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(bench: Bench) -> None:
        bench.note("first", 1)
        raise ValueError("no such device\nand more")

    found = end_of(monkeypatch, tmp_path, fails)
    assert (found["state"], found["first"]) == ("failed: ValueError: no such device", 1)


@forks
def test_a_section_that_dies_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = end_of(monkeypatch, tmp_path, lambda bench: os._exit(7))
    assert found["state"] == "its process died (exit code 7)"


def test_without_time_all_is_skipped_and_the_most_valuable_would_come_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "load_libraries", lambda: None)
    options = argparse.Namespace(device="cpu", small=False, out=tmp_path, seconds=1.0)
    found = gpu.run(options, list(gpu.SECTIONS), tmp_path)
    assert list(found["sections"])[:5] == ["machine", "families", "syncs", "bytes", "jobs"]
    assert all(one["state"].startswith("skipped: ") for one in found["sections"].values())
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"] == found["sections"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "load_libraries", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = argparse.Namespace(device="cuda:0", small=False, out=tmp_path, seconds=1.0)
    with pytest.raises(SystemExit, match="sees no GPU here; --small runs on the CPU"):
        gpu.run(options, list(gpu.SECTIONS), tmp_path)


def test_a_measurement_fails_or_is_skipped_in_one_line(tmp_path: Path) -> None:
    bench = Bench("cpu", False, tmp_path, time.monotonic() + 5, tmp_path / "part.json")
    assert bench.measure("late", lambda: 1, needs_s=60) is None
    assert bench.measure("wrong", lambda: [][0]) is None
    assert bench.measure("right", lambda: 2) == 2
    assert json.loads(bench.results.read_text()) == {
        "late": "skipped: it takes 60 s, and 5 s are left",
        "wrong": "failed: IndexError: list index out of range",
        "right": 2,
    }


def test_gaps_between_kernels_are_summed_by_stage() -> None:
    """Times in microseconds: kernels at 1-3 and 6-9 ms, encode until 2 ms, denoise until 10 ms."""
    spans = [
        ("stage encode", DeviceType.CPU, 0, 2000),
        ("stage denoise", DeviceType.CPU, 2000, 10000),
        ("gemm", DeviceType.CUDA, 1000, 3000),
        ("conv", DeviceType.CUDA, 6000, 9000),
        ("conv on another stream", DeviceType.CUDA, 6500, 8000),
    ]
    events = [
        SimpleNamespace(
            name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end)
        )
        for name, kind, start, end in spans
    ]
    found = summed(events, 1)
    assert found["busy"] == 0.5
    assert found["idle_ms_a_micro_batch"] == {"encode": 1.0, "denoise": 4.0}
    assert found["longest_gaps_ms"] == [(3.0, "denoise"), (1.0, "encode"), (1.0, "denoise")]
