"""Faults inside actors on real Ray: what each costs, and that no sample is lost or hidden."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.data import DataContext
from ray.data._internal.usage.collector import usage_collection_disabled

from batchgen import runner
from batchgen.attempts import News
from batchgen.cluster.join import cluster
from batchgen.engine.stream import _event, _read_ahead
from batchgen.errors import (
    InputError,
    ModelError,
    StorageFailed,
    UsageError,
)
from batchgen.output.marker import FailedMarker, Marker
from batchgen.output.verify import verify
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.shard import frames
from batchgen.shard.frames import Frame
from tests.datasets_on_disk import plan_for
from tests.outputs import spec_for
from tests.replica_faults import Drawing, Healed, Unstartable, job, stream
from tests.unit.test_ledger import MARKER

pytestmark = pytest.mark.usefixtures("ray_session")


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


def test_what_cannot_start_is_said_and_not_started_for_ever(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine", "fine"]), tmp_path / "out")
    with pytest.raises(ModelError, match="ImportError: no such kernel"):
        stream(plan, ledger, Unstartable)


def test_what_no_shard_can_escape_stops_the_job(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    plan, ledger = job(prompts(["fine", "stop", "fine"]), tmp_path / "out")
    with pytest.raises(StorageFailed, match="the bucket is gone"):
        stream(plan, ledger)


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
