"""A row that crashes its shard on every attempt is left out, and the rest is committed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from batchgen.engine.actors import Decode, Denoise, Encode, Generate, StageActor
from batchgen.engine.pools import Reservation
from batchgen.engine.stream import generate
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker, Marker
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.records import ConditionBatch, EncodedBatch, LatentBatch
from batchgen.shard.frames import Frame
from batchgen.shard.work import Trial
from batchgen.storage import open_store
from tests.arithmetic_stages import (
    ArithmeticDecoder,
    ArithmeticDenoiser,
    ArithmeticEncoder,
    arithmetic_stages,
    make_output,
)
from tests.datasets_on_disk import plan_for

pytestmark = pytest.mark.usefixtures("ray_session")
ONE = Reservation(min_replicas=1, max_replicas=1, num_cpus=0.5, num_gpus=0)
POISON_SEED, HANG_SEED, RAISE_SEED = 666_000_001, 666_000_002, 666_000_003


def act(seeds: list[int]) -> None:
    if POISON_SEED in seeds:
        os._exit(1)
    if HANG_SEED in seeds:
        threading.Event().wait()  # for ever
    if RAISE_SEED in seeds:
        raise ZeroDivisionError("this row is too much")


class PoisonedEncoder(ArithmeticEncoder):
    def __call__(self, batch: ConditionBatch) -> EncodedBatch:
        act([sample.seed for sample in batch.samples])
        return super().__call__(batch)


class PoisonedDenoiser(ArithmeticDenoiser):
    def __call__(self, batch: EncodedBatch) -> LatentBatch:
        act(batch.generator_states[:, 0].tolist())
        return super().__call__(batch)


class Poisoned(Generate):
    """A sample's seed decides what happens to the process that encodes it."""

    def load(self) -> None:
        self.stages = arithmetic_stages()
        self.stages.encoder = PoisonedEncoder()  # type: ignore[assignment]


class TensorEncoder(ArithmeticEncoder):
    """Tensors, as they travel between pools.

    torch is imported while the replica loads, as by real stages, not by two threads at once.
    """

    def __init__(self) -> None:
        import torch

        super().__init__()
        self._tensor = torch.as_tensor

    def __call__(self, batch: ConditionBatch) -> EncodedBatch:
        encoded = super().__call__(batch)
        facts = self._tensor(encoded.prompts["facts"])  # (n, 4)
        return replace(encoded, prompts={"facts": facts}, generator_states=facts[:, :1])


class PlainEncode(Encode):
    def load(self) -> None:
        self.stage = TensorEncoder()  # type: ignore[assignment]


class PoisonedDenoise(Denoise):
    def load(self) -> None:
        self.stage = PoisonedDenoiser()  # type: ignore[assignment]


class PlainDecode(Decode):
    def load(self) -> None:
        self.stage = ArithmeticDecoder()  # type: ignore[assignment]


class Forgetful(Generate):
    """Its first shard kills the process that holds the record of attempts, and then fails once."""

    def load(self) -> None:
        self.stages = arithmetic_stages()

    def work(self, frame: Frame, trial: Trial) -> Frame:
        here = Path(self.plan.spec.output.url).with_suffix(".killed")
        if frame.shard == 0 and not here.exists():
            here.touch()
            ray.kill(self.attempts._holder, no_restart=False)  # type: ignore[union-attr]
            raise ZeroDivisionError("once")
        return super().work(frame, trial)


FUSED: list[tuple[type[StageActor], Reservation]] = [(Poisoned, ONE)]
STAGED: list[tuple[type[StageActor], Reservation]] = [
    (actor, ONE) for actor in (PlainEncode, PoisonedDenoise, PlainDecode)
]


def stream(plan: Plan, ledger: Ledger, pools: Any) -> dict[int, Marker | FailedMarker]:
    pending = ledger.states(plan).pending
    events = list(generate(plan, ledger, pending, pools))
    assert sorted(event.shard for event in events) == pending
    return {event.shard: event for event in events}


def made(ledger: Ledger) -> dict[str, str]:
    """key -> sha256 of everything in ``data/``."""
    tables = [
        pq.read_table(ledger.store.path(f"data/{name}"), columns=["key", "sha256"])
        for name in ledger.store.list("data")
    ]
    return {row["key"]: row["sha256"] for table in tables for row in table.to_pylist()}


def job(source: Path, output: Path, **settings: Any) -> tuple[Plan, Ledger]:
    settings.setdefault("policy__shard_retries", 1)
    sizes = {"output__samples_per_shard": 8, "resources__batch_size": 4}
    columns = {"input__columns": {"key": "key", "seed": "seed"}}
    plan = plan_for(source, output, **sizes, **columns, **settings)
    ledger = Ledger(open_store(str(output)))
    ledger.freeze(plan, plan.spec)
    return plan, ledger


def test_the_row_is_left_out_and_the_rest_has_its_bytes(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    leaves_out_the_row(prompts, tmp_path, FUSED, POISON_SEED)


def leaves_out_the_row(prompts: Callable[..., Path], tmp_path: Path, pools: Any, seed: int) -> None:
    """One row dies or raises each time; only it is missing, and the others have their bytes."""
    seeds = list(range(100, 116))
    keys = [f"row{row}" for row in range(16)]
    clean, ledger = job(prompts(16, "clean.parquet", key=keys, seed=seeds), tmp_path / "clean")
    make_output(clean, ledger)  # nothing is lost: no need of Ray
    expected = made(ledger)
    seeds[5] = seed  # second micro-batch of the first shard
    plan, ledger = job(prompts(16, "it.parquet", key=keys, seed=seeds), tmp_path / "poisoned")
    events = stream(plan, ledger, pools)
    first, second = events[0], events[1]
    assert isinstance(first, Marker) and isinstance(second, Marker)
    assert (first.counts.accepted, first.counts.failed) == (7, 1)
    assert first.reasons == {"fails-its-shard": 1}
    assert second.counts.accepted == 8
    found = made(ledger)
    (lost,) = set(expected) - set(found)
    assert lost == "row5-v0"
    assert found == {key: expected[key] for key in found}
    assert [p for p in verify(ledger).problems if "failed" not in p] == []
    rejects = pq.read_table(ledger.store.path("_batchgen/rejects/00000.parquet")).to_pylist()
    assert [row["key"] for row in rejects] == [lost]
    why = "worker process died" if seed == POISON_SEED else "ZeroDivisionError: this row is too"
    assert why in rejects[0]["message"]


def test_the_record_of_attempts_may_die(prompts: Callable[..., Path], tmp_path: Path) -> None:
    keys = [f"row{row}" for row in range(32)]
    plan, ledger = job(prompts(32, key=keys, seed=list(range(100, 132))), tmp_path / "out")
    events = stream(plan, ledger, [(Forgetful, ONE)])
    assert (tmp_path / "out.killed").exists()
    assert [type(event) for event in events.values()] == [Marker] * 4
    assert verify(ledger).problems == []
