"""A replica out of memory retries, decodes less at once or stops; no sample is blamed."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchgen.attempts import Attempts
from batchgen.engine import actors, loading, memory
from batchgen.engine.actors import Generate, Job
from batchgen.errors import DoesNotFit, from_facts
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker, Marker, parse_failed, parse_marker
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.records import ConditionBatch, EncodedBatch, ImageBatch, LatentBatch
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.stages.queue import Later
from batchgen.storage import open_store
from tests.arithmetic_stages import (
    ArithmeticDecoder,
    ArithmeticDenoiser,
    ArithmeticEncoder,
    arithmetic_stages,
)
from tests.datasets_on_disk import plan_for, write_columns
from tests.memory_errors import LACKING

WORDED = ["torch", "cuBLAS", "cuDNN, engine", "cuDNN 9, device", "torch, host", "CUDA runtime"]


class Faults:
    """How often each stage still runs out of memory, and what was asked of the decoder."""

    def __init__(self, error: Exception, **times: float) -> None:
        self.error = error
        self.times = dict(times)
        self.decoded: list[int] = []

    def meet(self, stage: str) -> None:
        if self.times.get(stage, 0) > 0:
            self.times[stage] -= 1
            raise copy.copy(self.error)  # an exception keeps the traceback of its last raise


class Short(Generate):
    """Arithmetic stages that run out of memory as ``faults`` says."""

    faults: Faults

    def load(self) -> None:
        faults = self.faults

        class Encoder(ArithmeticEncoder):
            def __call__(self, batch: ConditionBatch) -> EncodedBatch:
                faults.meet("encode")
                return super().__call__(batch)

        class Denoiser(ArithmeticDenoiser):
            def __call__(self, batch: EncodedBatch) -> LatentBatch:
                faults.meet("denoise")
                return super().__call__(batch)

        class Decoder(ArithmeticDecoder):
            def start(self, batch: LatentBatch, batch_size: int | None = None) -> Later[ImageBatch]:
                faults.decoded.append(batch_size or 0)
                faults.meet("decode" if batch_size is None else "decode_one")
                return super().start(batch)

        self.stages = arithmetic_stages()
        self.stages.encoder = Encoder()  # type: ignore[assignment]
        self.stages.denoiser = Denoiser()  # type: ignore[assignment]
        self.stages.decoder = Decoder()  # type: ignore[assignment]


class Run:
    """One replica and the shards of a small job: 8 rows in 2 shards, by micro-batches of 2."""

    def __init__(self, folder: Path, faults: Faults, **settings: Any) -> None:
        source = write_columns(folder / "in.parquet", {"prompt": [f"row {n}" for n in range(8)]})
        sizes = {"output__samples_per_shard": 4, "resources__batch_size": 2}
        self.plan: Plan = plan_for(source, folder / "out", **{**sizes, **settings})
        self.ledger = Ledger(open_store(str(folder / "out")))
        self.ledger.freeze(self.plan, self.plan.spec)
        self.attempts = Attempts()
        kind = type("Generate", (Short,), {"faults": faults})
        self.actor = kind(Job(self.plan, self.ledger.store.url, 0.0), self.attempts)

    def __call__(self) -> list[Frame]:
        columns = read_columns(self.plan.spec, [name for name, _ in self.plan.columns])
        return [
            frames.from_block(self.actor(frames.from_rows(rows).to_block()))
            for span in make_spans(self.plan, range(self.plan.shards))
            for rows in read_span(span, self.plan.spec, columns)
        ]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "pause", lambda tries: None)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    return lambda faults, **settings: Run(tmp_path, faults, **settings)


def markers(ended: list[Frame]) -> list[Marker]:
    assert [frame.state for frame in ended] == [frames.COMMITTED] * len(ended)
    return [parse_marker(frame.facts) for frame in ended]


def all_accepted(run: Run, found: list[Marker]) -> None:
    assert [marker.counts.accepted for marker in found] == [4, 4]
    assert verify(run.ledger).ok


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("name", WORDED)
def test_a_decoder_out_of_memory_decodes_one_by_one(
    run: Callable[..., Run], name: str, retries: int
) -> None:
    faults = Faults(LACKING[name], decode=1)
    one = run(faults, policy__shard_retries=retries)
    found = markers(one())
    all_accepted(one, found)
    assert faults.decoded == [0, 1, 1, 1, 1], "the second shard is not tried with larger calls"
    assert [marker.decode_batch_size for marker in found] == [1, 1]
    assert [marker.batch_size for marker in found] == [2, 2]
    assert [marker.attempt for marker in found] == [2, 1]
    (said,) = one.attempts.news(0).said
    assert "too little memory to decode 2 images at a time" in said


@pytest.mark.parametrize("name", WORDED)
@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_a_stage_out_of_memory_once_is_repeated(
    run: Callable[..., Run], stage: str, name: str
) -> None:
    one = run(Faults(LACKING[name], **{stage: 1}), policy__shard_retries=0)
    found = markers(one())
    all_accepted(one, found)
    assert [marker.attempt for marker in found] == [2, 1]
    assert [marker.decode_batch_size for marker in found] == [2, 2]
    assert one.attempts.news(0).said == []


@pytest.mark.parametrize("name", WORDED)
@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("encode", "lower resources.batch_size, for example to 1"),
        ("denoise", "lower resources.batch_size, for example to 1"),
        ("decode", "resources.vae_tiling: true"),
    ],
)
def test_what_never_fits_stops_the_job_and_drops_nothing(
    run: Callable[..., Run], stage: str, told: str, name: str
) -> None:
    always = dict.fromkeys([stage, f"{stage}_one"], float("inf"))
    one = run(Faults(LACKING[name], **always))
    first, *_ = one()
    assert first.state == frames.STOPPED
    stop = from_facts(json.loads(first.facts))
    assert isinstance(stop, DoesNotFit) and stop.exit_code == 3
    assert told in str(stop) and str(LACKING[name])[:20] in str(stop)
    states = one.ledger.states(one.plan)
    assert (states.committed, states.failed) == (frozenset(), frozenset())
    assert one.ledger.store.list("_batchgen/rejects") == {}


def test_a_lack_of_memory_between_samples_fails_the_shard_and_blames_no_sample(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a table that does not fit into the host's memory."""
    one = run(Faults(MemoryError()), policy__shard_retries=1)

    def work(frame: Frame, trial: Any) -> Frame:
        trial.working_on(["row0-v0"])
        raise MemoryError("no room for the table")

    monkeypatch.setattr(one.actor, "work", work)
    first, _ = one()
    assert first.state == frames.FAILED
    failed: FailedMarker = parse_failed(first.facts)
    assert (failed.error, failed.attempts) == ("MemoryError", 2)
    assert one.ledger.store.list("_batchgen/rejects") == {}


def test_a_lost_device_still_ends_the_process(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class AcceleratorError(RuntimeError):
        pass

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(actors.os, "_exit", end)
    one = run(Faults(AcceleratorError("CUDA error: an illegal memory access"), denoise=1))
    with pytest.raises(Ended):
        one()


def test_the_second_try_begins_with_an_empty_cache(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the failed attempt held is gone by then: its traceback is no longer kept."""
    alive: list[int] = []
    cleared: list[int] = []
    held: list[weakref.ref[Any]] = []

    class Held:
        pass

    faults = Faults(LACKING["torch"], denoise=1)
    one = run(faults)
    denoise = one.actor.stages.denoiser

    def holding(batch: EncodedBatch) -> LatentBatch:
        kept = Held()  # like a tensor of the frame that fails
        held.append(weakref.ref(kept))
        made: LatentBatch = denoise(batch)
        return made

    def clear() -> None:
        cleared.append(1)
        gc.collect()
        alive.append(sum(one() is not None for one in held))

    monkeypatch.setattr(one.actor.stages, "denoiser", holding)
    monkeypatch.setattr(memory, "clear_cache", clear)
    monkeypatch.setattr("batchgen.shard.stages.parameter_counts", lambda stage: {})
    markers(one())
    assert cleared == [1] and alive == [0]


def test_the_message_tells_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib, 48 * gib))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 45 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    assert memory.memory_facts("cuda:0") == (
        " (GPU NVIDIA L40S: this process used up to 45.0 of 48.0 GiB, 1.0 GiB are free)"
    )
    assert memory.memory_facts("cpu") == ""


def test_the_cache_of_a_gpu_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    memory.clear_cache()
    assert calls == ["empty"]


@pytest.mark.parametrize(("name", "times"), [("cuBLAS", 1), ("torch", 1), ("CUDA runtime", 0)])
def test_loading_clears_the_cache_unless_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(loading, "clear_cache", lambda: cleared.append(1))

    def load() -> None:
        raise copy.copy(LACKING[name])

    error, is_lost = loading._once(load)
    assert "the model cannot be loaded" in str(error)
    assert (len(cleared), is_lost) == (times, not times)
    hinted, _ = loading._once(load, lambda: "use a larger GPU")
    assert str(hinted) == f"{error}; use a larger GPU"
