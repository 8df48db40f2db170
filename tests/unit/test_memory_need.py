"""Arithmetic of a model's memory: peaks, the largest batch size, and what is told about devices."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.cli import memory as told
from batchgen.cli.memory import available, fits, host
from batchgen.engine.batch_size import Group, groups_of, most_for, sizes_for
from batchgen.errors import ModelError
from batchgen.models import memory
from batchgen.models.memory import FUSED, MemoryNeed, StageNeed, largest_batch, need_of
from batchgen.plan.call_settings import usual_call
from batchgen.plan.plan import Plan
from batchgen.spec.sections import Pool, Resources
from tests.datasets_on_disk import plan_for

GIB = 1 << 30
RUN = subprocess.run
NEED = MemoryNeed(
    {
        "encode": StageNeed(2 * GIB, 0, GIB // 8),
        "denoise": StageNeed(5 * GIB, GIB, GIB // 2),
        "decode": StageNeed(GIB, 0, 2 * GIB),
    },
    cache_bytes=GIB,
)


def test_a_replica_of_all_stages_needs_all_weights_and_the_largest_call() -> None:
    assert NEED.peak("encode", 8) == 2 * GIB + GIB + GIB
    assert NEED.peak("denoise", 8) == 5 * GIB + GIB + 4 * GIB
    assert NEED.peak(FUSED, 8) == 8 * GIB + GIB + 16 * GIB


def test_the_largest_batch_is_the_last_that_fits() -> None:
    assert largest_batch(NEED, 25 * GIB, headroom=0) == 8
    assert largest_batch(NEED, 25 * GIB - 1, headroom=0) == 7
    assert largest_batch(NEED, 25 * GIB, headroom=0.1) == 6
    assert largest_batch(NEED, 10 * GIB, headroom=0) == 0
    assert largest_batch(NEED, 10 * GIB, headroom=0, stages=("decode",)) == 4
    assert largest_batch(NEED, 1e18) == 1024
    together = sum(NEED.peak(one, 3) for one in ("encode", "denoise", "decode"))
    assert largest_batch(NEED, together, 0, ("encode", "denoise", "decode")) == 3


def test_the_decoder_can_have_smaller_calls() -> None:
    assert NEED.peak(FUSED, 8, 2) == 8 * GIB + GIB + 5 * GIB
    assert NEED.peak("decode", 8, 2) == 5 * GIB
    assert largest_batch(NEED, 25 * GIB, headroom=0, decode_size=1) == 30
    assert largest_batch(NEED, 11 * GIB, headroom=0, decode_size=1) == 2


MOVABLE = MemoryNeed(
    {
        "encode": StageNeed(6 * GIB, 0, GIB // 8, 6 * GIB, GIB // 2, 7 * GIB),
        "denoise": StageNeed(10 * GIB, GIB, GIB // 2, 9 * GIB, 2 * GIB, 12 * GIB),
        "decode": StageNeed(GIB, 0, 2 * GIB, 0, 0, 0),
    },
    cache_bytes=0,
)


def test_offloaded_weights_are_on_the_device_only_in_part_and_during_a_call() -> None:
    assert MOVABLE.peak(FUSED, 1) == (17 + 2) * GIB
    kept = MOVABLE.offloading(["encode"])
    assert (kept.weights("encode"), kept.weights(FUSED)) == (0, 11 * GIB)
    assert (kept.host("encode"), kept.host("denoise"), kept.host(FUSED)) == (7 * GIB, 0, 7 * GIB)
    assert kept.peak("encode", 4) == GIB
    assert kept.peak("denoise", 2) == MOVABLE.peak("denoise", 2) == 12 * GIB
    kept = MOVABLE.offloading(["denoise", "encode"])
    assert kept.weights(FUSED) == (1 + 1) * GIB
    assert kept.peak("denoise", 2) == GIB + (1 + 1 + 2) * GIB
    assert kept.peak(FUSED, 1) == 2 * GIB + int(3.5 * GIB)
    assert kept.host(FUSED) == 19 * GIB
    assert kept.offloading(()) == MOVABLE


@pytest.mark.parametrize(
    ("offload", "gib", "best"), [((), 12, 0), (("denoise",), 14, 2), (("encode", "denoise"), 12, 4)]
)
def test_offloading_makes_room_for_larger_batches(
    offload: tuple[str, ...], gib: int, best: int
) -> None:
    assert largest_batch(MOVABLE.offloading(offload), gib * GIB, headroom=0.1) == best


def test_a_gpu_that_is_too_small_is_told_what_offloading_changes() -> None:
    fused = [Group((FUSED,), 1.0)]

    def advice(need: MemoryNeed, groups: list[Group], size: int, gib: int) -> str:
        return fits(need, groups, (size, size), "NVIDIA L4", gib * GIB).message

    some = "which keeps weights in host memory, batch sizes up to"
    said = advice(MOVABLE, fused, 1, 16)
    assert said.endswith(f"(num_gpus); with resources.offload: [encode], {some} 1 fit")
    assert advice(MOVABLE, fused, 2, 16).endswith(f"offload: [denoise], {some} 3 fit")
    assert advice(MOVABLE, fused, 4, 16).endswith(f"offload: [encode, denoise], {some} 6 fit")
    assert advice(MOVABLE, fused, 8, 16).endswith(f"offload: [encode, denoise], {some} 6 fit")
    kept = MOVABLE.offloading(["encode"])
    assert advice(kept, fused, 4, 16).endswith(f"offload: [encode, denoise], {some} 6 fit")
    for need, groups in (
        (MOVABLE, [Group((FUSED,), 2.0)]),  # divided over two
        (MOVABLE.offloading(["encode", "denoise"]), fused),
    ):
        assert "offload" not in advice(need, groups, 64, 16)
    staged = [Group(("denoise",), 2.0), Group(("encode", "decode"), 1.0)]
    assert "with resources.offload: [encode], " in advice(MOVABLE, staged, 2, 8)


@pytest.mark.parametrize(
    ("gib", "most", "sizes"),
    [
        (80, 32, (32, 31)),  # 8 + 1 GiB, and 2 for each image that is decoded; 72 are used
        (80, 16, (16, 16)),
        (24, 32, (23, 6)),
        (12, 32, (1, 1)),
        (8, 32, (1, 1)),  # nothing fits
    ],
)
def test_a_batch_size_is_chosen_for_a_gpu(gib: int, most: int, sizes: tuple[int, int]) -> None:
    """The decoder alone would need a smaller batch size, so it has calls of its own."""
    assert sizes_for(NEED, [Group((FUSED,), 1.0)], gib * GIB, most) == sizes


def test_a_share_of_a_gpu_and_several_gpus_count() -> None:
    assert sizes_for(NEED, [Group((FUSED,), 0.5)], 48 * GIB, 32) == (23, 6)
    assert sizes_for(NEED, [Group((FUSED,), 2.0)], 12 * GIB, 32) == (23, 6)


def test_a_batch_is_no_larger_than_pays_and_divides_a_shard_evenly(
    planned: Callable[..., Plan],
) -> None:
    def most(**fields: Any) -> int:
        plan = planned(**fields)
        return most_for(plan.spec, plan.model)

    sized = {"sampling__width": 512, "sampling__height": 512}
    assert most(output__samples_per_shard=64, **sized) == 32
    assert most(output__samples_per_shard=50, **sized) == 25
    assert most(output__samples_per_shard=5, **sized) == 5
    sized = {"sampling__width": 1024, "sampling__height": 1024}
    assert most(output__samples_per_shard=64, **sized) == 8
    sized = {"sampling__width": 4096, "sampling__height": 4096}
    assert most(**sized) == 1


def of(layout: str, **shares: float) -> list[Group]:
    pools = {name: Pool(num_gpus=share) for name, share in shares.items()}
    return groups_of(Resources(layout=layout, **pools))


def test_stages_with_fractions_of_a_gpu_share_one() -> None:
    assert of("fused") == [Group((FUSED,), 1.0)]
    assert of("fused", generate=0.5) == [Group((FUSED,), 0.5)]
    assert of("staged") == [Group(("encode", "denoise", "decode"), 1.0)]
    assert of("staged", denoise=2) == [Group(("denoise",), 2.0), Group(("encode", "decode"), 1.0)]
    each = of("staged", encode=0.5, denoise=1, decode=0.6)
    assert each == [Group(("encode",), 0.5), Group(("denoise",), 1.0), Group(("decode",), 0.6)]


def test_a_gpu_that_is_too_small_is_named_with_the_batch_size_that_fits() -> None:
    fused = [Group((FUSED,), 1.0)]
    check = fits(NEED, fused, (8, 8), "NVIDIA L40S", 45 * GIB)
    assert check.grade == "ok"
    assert check.message == (
        "a replica needs 25.0 GiB of a GPU; NVIDIA L40S has 45.0 GiB, 10% of it as reserve: batch "
        "sizes up to 15 fit"
    )
    check = fits(NEED, fused, (8, 8), "NVIDIA L4", 22 * GIB)
    assert check.grade == "warning"
    assert check.message.endswith("set resources.batch_size to 5 or less")
    check = fits(NEED, fused, (8, 8), "NVIDIA T4", 8 * GIB)
    assert check.grade == "warning" and "no batch size fits; choose a smaller" in check.message
    check = fits(NEED, of("staged", denoise=2), (8, 8), "NVIDIA L4", 22 * GIB)
    assert "denoise needs 10.0 GiB of 2 GPUs, encode + decode needs 21.0 GiB of" in check.message


@pytest.fixture
def planned(prompts: Callable[..., Path], tmp_path: Path) -> Callable[..., Plan]:
    return lambda **fields: plan_for(prompts(12), tmp_path / "out", **fields)


def test_the_replicas_of_a_machine_are_compared_with_its_memory(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(output__samples_per_shard=1)
    fused = [Group((FUSED,), 1.0)]
    monkeypatch.setattr(told, "available", lambda: 40 * GIB)
    (check,) = host(plan, NEED, fused, 8)
    assert (check.grade, check.message) == (
        "warning",
        "replicas that load at the same time: up to 8 x 6.0 GiB; 40.0 GiB are available",
    )
    (check,) = host(plan, NEED, fused, 2)
    assert check.grade == "ok"
    (check,) = host(planned(output__samples_per_shard=12), NEED, fused, 8)  # one shard
    assert ": up to 1 x 6.0 GiB" in check.message
    kept = MOVABLE.offloading(["encode", "denoise"])
    (check,) = host(plan, kept, fused, 1)  # 10 GiB of the denoiser before it is pinned
    assert ": up to 1 x 30.0 GiB" in check.message
    each = [Group(("encode", "denoise", "decode"), 1.0)]
    (check,) = host(planned(resources__layout="staged"), kept, each, 1)
    assert ": up to 1 x 39.0 GiB" in check.message
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (check,) = host(plan, kept, [], 0)
    assert ": up to 2 x 34.0 GiB" in check.message, "a CPU's weights are in host memory anyway"
    (check,) = host(plan, NEED, [], 0)
    assert check.message == "replicas on the CPU: up to 2 x 26.0 GiB; 40.0 GiB are available"
    monkeypatch.setattr(told, "available", lambda: None)
    assert list(host(plan, NEED, fused, 8)) == []


def test_the_memory_that_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "MEMORY_FILE", tmp_path / "meminfo")
    assert available() is None
    told.MEMORY_FILE.write_text("MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable:  800 kB\n\n")
    assert available() == 800 << 10


def ending(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Let another program answer instead of the one that measures."""

    def other(_: Any, **how: Any) -> Any:
        return RUN(["/bin/sh", "-c", " ".join(words)], **how)

    monkeypatch.setattr(memory.subprocess, "run", other)


def test_a_process_that_fails_or_hangs_is_an_error(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned()
    call = usual_call(plan.spec, plan.model)
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))
    ending(monkeypatch, "cat >/dev/null; echo 'ImportError: no torch' >&2; exit 1")
    with pytest.raises(ModelError, match="cannot be computed: ImportError: no torch"):
        need_of(plan.model, plan.spec, call)
    ending(monkeypatch, "cat >/dev/null; exec sleep 60")
    with pytest.raises(ModelError, match="took longer than 1 s"):
        need_of(plan.model, plan.spec, call, within_s=1)


def test_a_need_is_computed_once(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned()
    call = usual_call(plan.spec, plan.model)
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))
    answer = json.dumps(asdict(NEED))
    ending(monkeypatch, f"cat >/dev/null; echo '{answer}'")
    assert need_of(plan.model, plan.spec, call) == NEED
    ending(monkeypatch, "cat >/dev/null; echo no >&2; exit 1")
    assert need_of(plan.model, plan.spec, call) == NEED
    with pytest.raises(ModelError):
        need_of(plan.model, plan.spec, replace(call, width=call.width * 2))
    (kept,) = (tmp_path / "cache" / "memory").iterdir()
    kept.write_text(kept.read_text()[:-9])  # damaged: it is computed again
    ending(monkeypatch, f"cat >/dev/null; echo '{answer}'")
    assert need_of(plan.model, plan.spec, call) == NEED
    assert memory.read_need(json.loads(kept.read_text())) == NEED
