"""Faults inside actors on real Ray: what each costs, and that no sample is lost or hidden."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import DataContext
from ray.data._internal.usage.collector import usage_collection_disabled
from safetensors.torch import load_file, save_file

from batchgen import runner
from batchgen.attempts import News
from batchgen.cluster.join import cluster, this_actor
from batchgen.engine import loading
from batchgen.engine.actors import Generate, StageActor
from batchgen.engine.listen import HEAR_EVERY_S
from batchgen.engine.pools import Reservation
from batchgen.engine.stream import _event, _read_ahead, generate
from batchgen.errors import (
    DoesNotFit,
    InputError,
    ModelError,
    RetryShard,
    StorageFailed,
    UsageError,
)
from batchgen.output.ledger import FailedMarker, Ledger, Marker
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.progress.display import Tally
from batchgen.records import EncodedBatch, ImageBatch, LatentBatch
from batchgen.report.finalize import finalize
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.storage import open_store
from tests.arithmetic_stages import ArithmeticDecoder, ArithmeticDenoiser, arithmetic_stages
from tests.datasets_on_disk import plan_for
from tests.outputs import spec_for
from tests.unit.test_ledger import MARKER

pytestmark = pytest.mark.usefixtures("ray_session")
Events = dict[int, Marker | FailedMarker]
POOLS_SHARE = Reservation(min_replicas=1, max_replicas=1, num_cpus=0.5, num_gpus=0)
TWO = Reservation(2, 2, num_cpus=0.5, num_gpus=0, start_replicas=2)


class Faulty(Generate):
    """Arithmetic stages with injected faults: words in the prompt choose the fault."""

    def load(self) -> None:
        self.stages = arithmetic_stages()

    def work(self, frame: Frame, trial: Trial) -> Frame:
        words = " ".join(frames.to_rows(frame).table.column("prompt").to_pylist()).split()
        if "die" in words or ("die-once" in words and frame.attempt == 1):
            os._exit(1)
        if "raise" in words:
            raise ZeroDivisionError("a fault of the code")
        if "retry-once" in words and frame.attempt == 1:
            raise RetryShard("a fault that passes")
        if "stop" in words:
            raise StorageFailed("the bucket is gone")
        return super().work(frame, trial)


class Healed(Faulty):
    """The same without faults."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        return Generate.work(self, frame, trial)


class Slow(Faulty):
    """Slow stages: shards overlap in one actor long enough to be lost in the same crash."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        time.sleep(0.2)
        return super().work(frame, trial)


class LargeDecoder(ArithmeticDecoder):
    """Only one image at a time fits."""

    def __call__(self, batch: LatentBatch, batch_size: int | None = None) -> ImageBatch:
        if batch_size != 1:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return super().__call__(batch)


class LargeDenoiser(ArithmeticDenoiser):
    """It never fits."""

    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")


class ShortOfMemory(Faulty):
    def load(self) -> None:
        super().load()
        self.stages.decoder = LargeDecoder()  # type: ignore[assignment]


class FarTooSmall(Faulty):
    def load(self) -> None:
        super().load()
        self.stages.denoiser = LargeDenoiser()  # type: ignore[assignment]


class Unstartable(Faulty):
    def load(self) -> None:
        raise ImportError("no such kernel")


class BadNode(Slow):
    """The first of two replicas cannot load its model, as many times as the input says."""

    def load(self) -> None:
        loading.FIRST_PAUSE_S = loading.LOOK_EVERY_S = 0.1
        place = Path(self.plan.spec.output.url).with_suffix(".loads")
        place.mkdir(exist_ok=True)
        mine = place / this_actor()
        with suppress(FileExistsError):
            (place / "first").symlink_to(mine)
        tries = len(mine.read_text()) if mine.exists() else 0
        mine.write_text("x" * (tries + 1))
        first = os.readlink(place / "first") == str(mine)
        if first and tries < int(self.plan.spec.seed):
            raise OSError("no space left on this node")
        super().load()


class FallsIll(BadNode):
    """The first replica crashes during work and for a while cannot load its model again."""

    def load(self) -> None:
        if _deaths(self.plan):
            super().load()
        else:
            Slow.load(self)

    def work(self, frame: Frame, trial: Trial) -> Frame:
        if frame.shard == 0 and not _deaths(self.plan):
            Path(self.plan.spec.output.url).with_suffix(".died").mkdir()
            os._exit(1)
        return super().work(frame, trial)


def _deaths(plan: Plan) -> bool:
    return Path(plan.spec.output.url).with_suffix(".died").exists()


def stream(
    plan: Plan,
    ledger: Ledger,
    actor: type[StageActor] = Faulty,
    share: Reservation = POOLS_SHARE,
    hear: Callable[[News], None] | None = None,
) -> Events:
    pending = ledger.states(plan).pending
    events = list(generate(plan, ledger, pending, [(actor, share)], hear))
    assert sorted(event.shard for event in events) == pending  # one event out per shard in
    return {event.shard: event for event in events}


def job(source: Path, output: Path, **settings: Any) -> tuple[Plan, Ledger]:
    """A frozen plan of one-row shards over arithmetic stages."""
    plan = plan_for(source, output, output__samples_per_shard=1, **settings)
    ledger = Ledger(open_store(str(output)))
    ledger.freeze(plan, plan.spec)
    return plan, ledger


def test_each_fault_costs_what_it_should(prompts: Callable[..., Path], tmp_path: Path) -> None:
    texts = ["fine", "die-once", "raise", "retry-once", "fine", "die", "fine", "fine"]
    source = prompts(texts)
    plan, ledger = job(source, tmp_path / "out", policy__shard_retries=2)
    events = stream(plan, ledger)
    failed = {k: event for k, event in events.items() if isinstance(event, FailedMarker)}
    assert set(failed) == {2, 5}
    assert failed[2].error == "ZeroDivisionError" and failed[2].attempts == 3
    assert "a fault of the code" in failed[2].traceback
    assert "died" in failed[5].message and failed[5].attempts == 3
    attempts = {k: event.attempt for k, event in events.items() if isinstance(event, Marker)}
    assert attempts[3] == 2 and attempts[1] >= 2
    states = ledger.states(plan)
    assert states.failed == {2, 5} and states.pending == [2, 5]
    outcome = finalize(plan, ledger, Tally(plan.shards, plan.samples))
    assert (outcome.exit_code, outcome.accepted, outcome.failed) == (2, 6, 2)
    assert not verify(ledger).ok

    healed = stream(plan, ledger, Healed)
    assert set(healed) == {2, 5}
    assert ledger.states(plan).failed == frozenset()
    assert finalize(plan, ledger, Tally(plan.shards, plan.samples)).exit_code == 0
    assert verify(ledger).ok


def test_no_record_of_attempts_outlives_its_run(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    """Runs that share a Ray left one process each."""
    plan, ledger = job(prompts(["fine", "fine"]), tmp_path / "out")
    stream(plan, ledger)
    deadline = time.monotonic() + 30
    while any(
        one["ActorClassName"] == "Attempts" and one["State"] != "DEAD"
        for one in ray._private.state.actors().values()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_deadly_shard_is_charged_alone(prompts: Callable[..., Path], tmp_path: Path) -> None:
    source = prompts(["die", "fine", "fine", "fine"])
    plan, ledger = job(source, tmp_path / "out", policy__shard_retries=1)
    events = stream(plan, ledger, Slow)
    failed = {k for k, event in events.items() if isinstance(event, FailedMarker)}
    assert failed == {0}


def test_what_cannot_start_is_said_and_not_started_for_ever(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine", "fine"]), tmp_path / "out")
    with pytest.raises(ModelError, match="ImportError: no such kernel"):
        stream(plan, ledger, Unstartable)


@pytest.mark.parametrize(("actor", "refusals", "least"), [(BadNode, 10_000, 3), (FallsIll, 3, 4)])
def test_a_replica_that_its_node_lets_not_start_costs_no_more_than_itself(
    prompts: Callable[..., Path],
    tmp_path: Path,
    actor: type[StageActor],
    refusals: int,
    least: int,
) -> None:
    plan, ledger = job(prompts(["fine"] * 40), tmp_path / "out", seed=refusals)
    said: list[str] = []
    events = stream(plan, ledger, actor, TWO, lambda news: said.extend(news.said))
    assert all(isinstance(event, Marker) for event in events.values())
    assert verify(ledger).ok
    (words,) = said
    assert "a replica of the" in words and "no space left on this node" in words
    assert len((tmp_path / "out.loads" / "first").read_text()) >= least


def test_what_no_shard_can_escape_stops_the_job(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine", "stop", "fine"]), tmp_path / "out")
    with pytest.raises(StorageFailed, match="the bucket is gone"):
        stream(plan, ledger)


def test_a_decoder_that_does_not_fit_decodes_one_by_one(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine"] * 4), tmp_path / "out", policy__shard_retries=0)
    said: list[str] = []
    events = stream(plan, ledger, ShortOfMemory, hear=lambda news: said.extend(news.said))
    found = [event for event in events.values() if isinstance(event, Marker)]
    assert [(marker.batch_size, marker.decode_batch_size) for marker in found] == [(8, 1)] * 4
    assert verify(ledger).ok
    assert "too little memory to decode 8 images at a time" in said[0]


def test_a_denoiser_that_does_not_fit_stops_the_job_and_drops_nothing(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine"] * 4), tmp_path / "out", policy__shard_retries=0)
    with pytest.raises(DoesNotFit, match=r"CUBLAS_STATUS_ALLOC_FAILED.*--batch-size 4"):
        stream(plan, ledger, FarTooSmall)
    assert ledger.states(plan).pending == [0, 1, 2, 3] and ledger.states(plan).failed == frozenset()
    assert ledger.store.list("_batchgen/rejects") == {}
    assert len(stream(plan, ledger, Healed)) == 4 and verify(ledger).ok


def test_a_damaged_input_stops_the_job_and_names_the_file(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    source = prompts([f"prompt number {n}" for n in range(500)])
    plan, ledger = job(source, tmp_path / "out")
    data = bytearray(source.read_bytes())
    data[4:200] = bytes(196)
    source.write_bytes(data)
    with pytest.raises(InputError, match=source.name):
        stream(plan, ledger)


def test_a_model_that_vanished_is_named(prompts: Callable[..., Path], tmp_path: Path) -> None:
    plan, ledger = job(prompts(["fine"]), tmp_path / "out", model__path="nowhere/model")
    with pytest.raises(ModelError, match="nowhere/model"):
        stream(plan, ledger, Generate)


def test_a_demand_that_cannot_be_met_is_said_at_once(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    spec = spec_for(prompts(["fine"]), tmp_path / "out", resources__generate={"num_cpus": 512})
    with pytest.raises(
        UsageError, match=r"generate pool needs a node with 512 CPU.*has 1 node of 4 CPU"
    ):
        runner.run(spec, quiet=True)
    greedy = spec_for(prompts(["fine"]), tmp_path / "gpu", resources__generate={"num_gpus": 3})
    with pytest.raises(UsageError, match="3 GPU free"):
        runner.run(greedy, quiet=True)


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """The shipped model with NaN in the last layer of its U-Net."""
    model = tmp_path / "broken"
    shutil.copytree(Path(runner.__file__).parent / "shipped" / "digits-shapes", model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"] = tensors["conv_out.weight"] * float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return model


def test_a_hopeless_job_stops_early(
    prompts: Callable[..., Path], tmp_path: Path, broken_model: Path
) -> None:
    output = tmp_path / "out"
    spec = spec_for(prompts(["fine"] * 40), output, model__path=str(broken_model))
    outcome = runner.run(spec, quiet=True)
    assert outcome.exit_code == 2 and "policy.failed_limit" in outcome.message
    assert outcome.pending > 0
    (reason,) = outcome.reasons
    assert reason.reason == "non-finite" and reason.count == outcome.failed
    ledger = Ledger(open_store(str(output)))
    marker = next(ledger.markers(ledger.states(ledger.require_plan()).committed))
    assert marker.counts.failed == 4 and marker.reasons == {"non-finite": 4}


class Drawing(Faulty):
    """A shard that takes a while after its only micro-batch."""

    def work(self, frame: Frame, trial: Trial) -> Frame:
        trial.made(1)
        time.sleep(2 * HEAR_EVERY_S)
        return super().work(frame, trial)


def test_the_driver_hears_of_what_is_not_committed_yet(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine"] * 4), tmp_path / "out")
    heard: list[News] = []
    stream(plan, ledger, Drawing, hear=heard.append)
    assert heard[0].under_way == {} and heard[-1].began_before_s is not None
    told = [news.under_way for news in heard if news.under_way]
    assert told and all(number in range(4) for one in told for number in one)
    assert {made for one in told for made in one.values()} <= {1, 2}


def test_a_run_that_rejects_everything_stops_early_and_says_why(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    source = prompts([""] * 1000)
    spec = spec_for(source, tmp_path / "out", output__samples_per_shard=50)
    outcome = runner.run(spec, quiet=True)
    assert outcome.exit_code == 2 and "policy.rejected_limit (0.1)" in outcome.message
    assert 0 < outcome.rejected < 1000 and outcome.pending > 0
    assert (outcome.images_made, outcome.images_per_second) == (0, 0.0)
    (reason,) = outcome.reasons
    assert reason.reason == "empty-prompt" and reason.count == outcome.rejected
    assert reason.example is not None and "a prompt is needed" in reason.example.message
    page = (tmp_path / "out" / "_batchgen" / "report.html").read_text()
    assert "Stopped." in page and "far above policy.rejected_limit" in page
    said = Ledger(open_store(str(tmp_path / "out"))).logs()
    assert "starting Ray" in said and "loading digits-shapes on 1 replica (CPU)" in said
    assert "stopped: " in said and "0 images in " in said

    asked = spec.model_copy(update={"policy": spec.policy.model_copy(update={"rejected_limit": 1})})
    finished = runner.run(asked, quiet=True)
    assert (finished.exit_code, finished.rejected, finished.pending) == (0, 1000, 0)


def test_an_attempt_counts_though_an_earlier_ones_marker_stands() -> None:
    """As when a node was cut off and comes back, after another one generated its shard again."""
    event = _event(Frame(MARKER.shard, frames.COMMITTED, 5, MARKER.to_json()))
    assert MARKER.attempt != 5
    assert event == replace(MARKER, attempt=5)


@pytest.mark.parametrize(
    ("row_bytes", "rows_per_shard", "ahead"),
    [(100, 1, 8), (1 << 20, 8, 8), (2 << 20, 16, 2), (8 << 20, 4, 2), (16 << 20, 64, 1)],
)
def test_readers_are_less_ahead_where_rows_are_large(
    prompts: Callable[..., Path], tmp_path: Path, row_bytes: int, rows_per_shard: int, ahead: int
) -> None:
    sizes = {"output__samples_per_shard": 2 * rows_per_shard, "variants": 2}
    plan = plan_for(prompts(256), tmp_path / "out", **sizes)
    (file,) = plan.files
    plan = replace(plan, files=(replace(file, size=row_bytes * 256),))
    assert _read_ahead(plan) == ahead


def test_ray_knows_the_setting_for_reading_ahead() -> None:
    """The setting is not public: if Ray renames it, setting it would silently do nothing."""
    assert "_max_num_blocks_in_streaming_gen_buffer" in vars(DataContext())


def test_ray_data_keeps_no_statistics_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a stream fails, usage statistics ask the head, and wait forever if the head is lost."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("RAY_DATA_USAGE_DISABLED", raising=False)
    assert not usage_collection_disabled()
    with cluster(None):
        assert usage_collection_disabled()
