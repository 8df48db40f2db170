"""Faults of replicas on real Ray that tests/ray does not try: each costs only what it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from batchgen import runner
from batchgen.engine.actors import Generate, StageActor
from batchgen.errors import DoesNotFit, ModelError
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker, Marker
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.outputs import spec_for
from tests.ray.test_poison import (
    FUSED,
    HANG_SEED,
    POISON_SEED,
    RAISE_SEED,
    STAGED,
    leaves_out_the_row,
)
from tests.ray.test_poison import job as poisoned_job
from tests.ray.test_poison import stream as poisoned_stream
from tests.replica_faults import (
    TWO,
    BadNode,
    FallsIll,
    FarTooSmall,
    Healed,
    ShortOfMemory,
    Slow,
    job,
    stream,
)

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.long]


def test_a_deadly_shard_is_charged_alone(prompts: Callable[..., Path], tmp_path: Path) -> None:
    source = prompts(["die", "fine", "fine", "fine"])
    plan, ledger = job(source, tmp_path / "out", policy__shard_retries=1)
    events = stream(plan, ledger, Slow)
    failed = {k for k, event in events.items() if isinstance(event, FailedMarker)}
    assert failed == {0}


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


def test_a_model_that_vanished_is_named(prompts: Callable[..., Path], tmp_path: Path) -> None:
    plan, ledger = job(prompts(["fine"]), tmp_path / "out", model__path="nowhere/model")
    with pytest.raises(ModelError, match="nowhere/model"):
        stream(plan, ledger, Generate)


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


@pytest.mark.parametrize(
    ("pools", "seed"),
    [(FUSED, RAISE_SEED), (STAGED, POISON_SEED), (STAGED, RAISE_SEED)],
    ids=["fused-raises", "staged-dies", "staged-raises"],
)
def test_the_row_is_left_out_and_the_rest_has_its_bytes(
    prompts: Callable[..., Path], tmp_path: Path, pools: Any, seed: int
) -> None:
    leaves_out_the_row(prompts, tmp_path, pools, seed)


def test_a_replica_that_is_stuck_is_started_anew(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    seeds = [100, 101, HANG_SEED, 103]
    limits = {"resources__generate": {"stuck_after_s": 3}, "policy__shard_retries": 0}
    plan, ledger = poisoned_job(
        prompts(4, key=["a", "b", "c", "d"], seed=seeds), tmp_path / "out", **limits
    )
    (marker,) = poisoned_stream(plan, ledger, FUSED).values()
    assert isinstance(marker, Marker)
    assert (marker.counts.accepted, marker.counts.failed) == (3, 1)
    assert marker.reasons == {"fails-its-shard": 1}


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
