"""On a device that works behind the host: what overlaps, in which order, and who is charged."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.plan.plan import Plan
from batchgen.shard.work import Trial
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_columns
from tests.late_device import LateQueue, late_stages
from tests.unit.test_shard import rows_of

BATCHES, LONG_S = 5, 30


@pytest.fixture
def queue() -> Iterator[LateQueue]:
    late = LateQueue()
    yield late
    late.close()


def planned(folder: Path, name: str = "out") -> Plan:
    """One shard of five micro-batches of two samples."""
    texts = {"prompt": [f"a cat {number}" for number in range(2 * BATCHES)]}
    source = write_columns(folder / "a.parquet", texts)
    return plan_for(source, folder / name, resources__batch_size=2)


def frozen(plan: Plan) -> Ledger:
    ledger = Ledger(open_store(plan.spec.output.url))
    ledger.freeze(plan, plan.spec)
    return ledger


class Gates:
    """One event for each micro-batch; who waits for one in vain fails."""

    def __init__(self) -> None:
        self._open = [threading.Event() for _ in range(BATCHES)]

    def open(self, number: int) -> None:
        self._open[number].set()

    def wait(self, number: int) -> None:
        if number < BATCHES:
            assert self._open[number].wait(LONG_S), f"the host waited for micro-batch {number - 1}"


def images(folder: Path) -> dict[str, bytes]:
    table = pq.read_table(folder / "data", columns=["key", "image"])
    return {row["key"]: row["image"]["bytes"] for row in table.to_pylist()}


def test_the_next_conditions_are_encoded_while_the_device_denoises(
    tmp_path: Path, queue: LateQueue
) -> None:
    encoded = Gates()
    plan = planned(tmp_path)
    stages = late_stages(queue, encoded.open, lambda number: encoded.wait(number + 1))
    marker = stages(rows_of(plan), plan, frozen(plan), 1)
    assert marker.counts.accepted == 2 * BATCHES
    for number in range(BATCHES - 1):
        assert queue.log.index(f"encode {number + 1}") < queue.log.index(f"denoise {number}")


def test_the_device_goes_on_while_images_are_copied_and_none_is_read_too_early(
    tmp_path: Path, queue: LateQueue
) -> None:
    begun = Gates()
    plan = planned(tmp_path)
    stages = late_stages(queue, denoise=begun.open, copy=lambda number: begun.wait(number + 1))
    stages(rows_of(plan), plan, frozen(plan), 1)
    plain = planned(tmp_path, "plain")
    make_output(plain, Ledger(open_store(plain.spec.output.url)))
    assert images(tmp_path / "out") == images(tmp_path / "plain")
    main = [one for one in queue.log if one.startswith(("denoise", "decode"))]
    assert main == [f"{what} {n}" for n in range(BATCHES) for what in ("denoise", "decode")]


def test_the_host_is_no_more_than_one_micro_batch_ahead(tmp_path: Path, queue: LateQueue) -> None:
    told: list[tuple[str, ...]] = []
    made: list[int] = []

    def working_on(keys: Iterable[str]) -> None:
        told.append(tuple(keys))

    plan = planned(tmp_path)
    trial = Trial(working_on=working_on, made=made.append)
    late_stages(queue)(rows_of(plan), plan, frozen(plan), 1, trial)
    groups = told[told.index(()) + 1 :]  # what prepare told comes first
    assert groups[-1] == () and max(map(len, groups)) == 4
    assert made == [2] * BATCHES
    assert all(one[-2:] == two[:2] for one, two in itertools.pairwise(groups[:-1]))


def test_a_careful_trial_waits_for_each_micro_batch(tmp_path: Path, queue: LateQueue) -> None:
    told: list[tuple[str, ...]] = []
    plan = planned(tmp_path)
    trial = Trial(working_on=lambda keys: told.append(tuple(keys)), careful=True)
    late_stages(queue)(rows_of(plan), plan, frozen(plan), 1, trial)
    assert queue.log == [
        f"{what} {number}"
        for number in range(BATCHES)
        for what in ("encode", "denoise", "decode", "copy")
    ]
    assert max(map(len, told)) == 2


def test_an_error_of_the_device_is_the_shards(tmp_path: Path, queue: LateQueue) -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise ZeroDivisionError("a kernel failed")

    plan = planned(tmp_path)
    ledger = frozen(plan)
    with pytest.raises(ZeroDivisionError, match="a kernel failed"):
        late_stages(queue, copy=fail)(rows_of(plan), plan, ledger, 1)
    assert ledger.marker(0) is None


def test_times_are_those_of_the_device(tmp_path: Path, queue: LateQueue) -> None:
    """A host that queues work needs no time for it."""
    gate = threading.Event()
    timer = threading.Timer(0.2, gate.set)

    def denoise(number: int) -> None:
        if number == 0:
            timer.start()
            assert gate.wait(LONG_S)

    plan = planned(tmp_path)
    marker: Marker = late_stages(queue, denoise=denoise)(rows_of(plan), plan, frozen(plan), 1)
    assert marker.timings_s["denoise"] >= 0.2
    assert {"encode", "denoise", "decode", "prepare", "wait"} <= set(marker.timings_s)
