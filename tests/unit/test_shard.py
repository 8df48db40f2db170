"""One shard through the stages: what overlaps, what is done once, and a scorer of one's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output import ledger as ledgers
from batchgen.output.ledger import Ledger
from batchgen.output.tally import Tally
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.records import ImageBatch, Sample, ShardRows
from batchgen.report.finalize import finalize
from batchgen.shard import images, prepare
from batchgen.shard.device import Device
from batchgen.shard.stages import encode_shard
from batchgen.shard.work import Trial
from batchgen.spec.spec import Spec
from batchgen.stages.scorers import choose, filters
from batchgen.stages.scorers.filters import Filter
from batchgen.stages.scorers.pixel_statistics import PixelStatistics
from batchgen.stages.scorers.scorer import ScoreColumn, Scored, Scores
from batchgen.storage import open_store
from tests.arithmetic_stages import ArithmeticEncoder, make_output
from tests.datasets_on_disk import plan_for, write_columns


def rows_of(plan: Plan) -> ShardRows:
    (span,) = make_spans(plan, [0])
    return next(
        read_span(span, plan.spec, read_columns(plan.spec, [name for name, _ in plan.columns]))
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def planned(tmp_path: Path, out: Path, columns: dict[str, Any], **dotted: Any) -> Plan:
    return plan_for(write_columns(tmp_path / "a.parquet", columns), out, **dotted)


def test_a_staged_encoder_prepares_its_shard_while_another_has_the_device(
    tmp_path: Path, out: Path
) -> None:
    plan = planned(tmp_path, out, {"prompt": ["a cat", "a dog"]})
    device, told, prepared = Device(), list[tuple[str, ...]](), threading.Event()

    def working_on(keys: Any) -> None:
        told.append(tuple(keys))
        if len(told) == 3:  # both rows, and the end of them
            prepared.set()

    trial = Trial(working_on=working_on)
    ended: list[int] = []

    def encode() -> None:
        encoder: Any = ArithmeticEncoder()
        work, encoded = encode_shard(encoder, device, rows_of(plan), plan, trial)
        ended.append(len(encoded))
        assert work.notes.timings_s["wait"] >= 0

    with device.lock:
        thread = threading.Thread(target=encode)
        thread.start()
        assert prepared.wait(30) and not ended
    thread.join(30)
    assert ended == [1]


class Colours:
    """A scorer as a user would write one: two columns, and a figure that only a filter reads."""

    columns = (
        ScoreColumn("red", pa.float64(), "mean of the red channel"),
        ScoreColumn("prompt_words", pa.int32(), "words of the prompt"),
    )
    reads = ("prompt",)
    compares = False
    fingerprint = "colours/1"
    figures = ("words",)

    def __call__(self, scored: Scored) -> Scores:
        words = np.array([len(prompt.split()) for prompt in scored.rows["prompt"]], np.int32)
        red = np.array([pixels[..., 0].mean() for pixels in scored.pixels])
        return {"red": red, "prompt_words": words, "words": words}


def test_a_scorer_brings_its_columns_and_a_filter_reads_its_figures(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(choose.SCORERS, "colours", Colours)
    monkeypatch.setattr(Spec, "scorers", ("pixel-statistics", "colours"))
    above = Filter("one-word", "rejected_limit", lambda limit, one: one["words"] <= 10 * limit, "x")
    monkeypatch.setattr(images, "FILTERS", (*filters.FILTERS, above))
    plan = planned(tmp_path, out, {"prompt": ["a cat", "dog", "a red star", "flat picture"]})
    assert plan.spec.policy.rejected_limit == 0.1
    ledger = Ledger(open_store(str(out)))
    make_output(plan, ledger)
    table = pq.read_table(out / "data")
    names = table.column_names
    assert names[names.index("prompt_truncated") + 1 :][:4] == [
        *("pixel_mean", "pixel_std", "red", "prompt_words"),
    ]
    assert "words" not in names
    assert table["prompt_words"].to_pylist() == [2, 3]
    assert all(0 < red < 255 for red in table["red"].to_pylist())
    marker = ledger.marker(0)
    assert marker is not None and marker.reasons == {"one-word": 1, "flat-image": 1}
    assert marker.examples["one-word"].message == "x"


def test_an_output_made_without_a_scorer_verifies_where_there_is_one_more(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, out, {"prompt": ["a cat", "a dog"]})
    ledger = Ledger(open_store(str(out)))
    ledger.freeze(plan, plan.spec)
    make_output(plan, ledger)
    monkeypatch.setitem(choose.SCORERS, "colours", Colours)
    assert verify(ledger).ok


def test_images_are_scored_while_the_device_goes_on(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"a cat {n}" for n in range(4)]
    plan = planned(tmp_path, out, {"prompt": texts}, resources__batch_size=2)
    every_batch_made = threading.Event()
    made: list[int] = []

    class Late(PixelStatistics):
        def __call__(self, scored: Scored) -> Scores:
            assert every_batch_made.wait(30), "the device waited for a score"
            return super().__call__(scored)

    monkeypatch.setattr(images, "scorer_named", lambda name: Late())
    add = images.ImagePool.add

    def added(pool: images.ImagePool, samples: Sequence[Sample], batch: ImageBatch) -> None:
        add(pool, samples, batch)
        made.append(len(samples))
        if sum(made) == plan.samples:
            every_batch_made.set()

    monkeypatch.setattr(images.ImagePool, "add", added)
    make_output(plan, Ledger(open_store(str(out))))
    assert pq.read_table(out / "data").num_rows == 4


@pytest.mark.parametrize(("columns", "calls"), [({}, 1), ({"guidance_scale": [2.0, 3.0, 2.0]}, 3)])
def test_a_call_is_computed_once_where_no_row_has_settings_of_its_own(
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: dict[str, list[float]],
    calls: int,
) -> None:
    mapped = {f"input__columns__{name}": name for name in columns}
    plan = planned(tmp_path, out, {"prompt": ["a", "b", "c"], **columns}, **mapped)
    counted: list[int] = []
    call = prepare._call

    def count(*given: Any) -> Any:
        counted.append(1)
        return call(*given)

    monkeypatch.setattr(prepare, "_call", count)
    result = prepare.prepare(rows_of(plan), plan)
    assert len(result.samples) == 3 and len(counted) == calls


def test_the_end_of_a_run_reads_each_marker_once(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"a cat {n}" for n in range(12)]
    plan = planned(tmp_path, out, {"prompt": texts}, output__samples_per_shard=3)
    ledger = Ledger(open_store(str(out)))
    make_output(plan, ledger)
    ledger.freeze(plan, plan.spec)
    read: list[str] = []
    parse = ledgers.parse_marker

    def count(data: bytes, place: str, remedy: str) -> ledgers.Marker:
        read.append(place.rpartition("/")[2])
        return parse(data, place, remedy)

    monkeypatch.setattr(ledgers, "parse_marker", count)
    outcome = finalize(plan, ledger, Tally(4, 12, 0.01, 0.1))
    assert outcome.exit_code == 0 and outcome.accepted == 12
    shown = len(read) - 4  # the contact sheet looks up a few shards again
    assert set(read) == {f"{shard:05d}.json" for shard in range(4)} and shown <= 4


def test_a_commit_looks_once_for_an_earlier_marker(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, out, {"prompt": ["a cat", "a dog"]})
    looked: list[int] = []
    marker = Ledger.marker

    def count(ledger: Ledger, shard: int) -> ledgers.Marker | None:
        looked.append(shard)
        return marker(ledger, shard)

    monkeypatch.setattr(Ledger, "marker", count)
    make_output(plan, Ledger(open_store(str(out))))
    assert looked == [0]


def test_versions_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images.environment.cache_clear()
    asked: list[str] = []
    monkeypatch.setattr(images, "version", lambda name: asked.append(name) or "1")
    first = images.environment("cpu", ("peft",))
    assert images.environment("cpu", ("peft",)) is first
    assert asked == [*images.PACKAGES, "peft"]
    images.environment.cache_clear()
