"""Reasons of dropped samples with an example, early stops, and where both are reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from batchgen.cli import main
from batchgen.errors import InputError
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Counts, Example, FailedMarker, Marker, parse_marker
from batchgen.output.outcome import count, hopeless, reason_lines, reasons_of, take_stock, verdict
from batchgen.output.rejects import by_reason
from batchgen.output.tally import Tally
from batchgen.plan.plan import Plan
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import paper_plan, plan_for


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Ledger]:
    """Twelve rows in four shards: 5 made, 2 of them cut; 4 rejected, one failed, a shard failed."""
    folder = tmp_path_factory.mktemp("outcome")
    texts = ["one", None, "two long", "flat", "broken", None, "three long", "four", "five", None]
    table = pa.table({"prompt": [*texts, "x", "y"], "kind": list("aabbaabbcdcd")})
    pq.write_table(table, folder / "in.parquet")
    settings = {"output__samples_per_shard": 3, "input__columns__label": "kind"}
    plan = plan_for(folder / "in.parquet", folder / "out", **settings)
    ledger = Ledger(open_store(str(folder / "out")))
    make_output(plan, ledger)
    (folder / "out" / "_batchgen" / "shards" / "00003.json").unlink()
    (folder / "out" / "_batchgen" / "rejects" / "00003.parquet").unlink()
    ledger.fail(FailedMarker(3, 3, "RuntimeError", "out of\nmemory", "trace", 3, "host", 0.0))
    return plan, ledger


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def tallied(output: tuple[Plan, Ledger]) -> Tally:
    plan, ledger = output
    return take_stock(plan, ledger, ledger.states(plan))[0]


def test_a_marker_has_the_first_sample_of_each_reason(output: tuple[Plan, Ledger]) -> None:
    marker = output[1].marker(0)
    assert marker is not None
    assert marker.examples == {
        "null-prompt": Example("in-00000001-v0", "column 'prompt' is null; a prompt is needed")
    }
    assert marker.labels == {"a": 1, "b": 1}


def test_markers_of_earlier_versions_have_no_examples(output: tuple[Plan, Ledger]) -> None:
    marker = output[1].marker(0)
    assert marker is not None
    tree = json.loads(marker.to_json())
    del tree["examples"], tree["labels"]
    old = parse_marker(json.dumps(tree).encode())
    assert (old.examples, old.labels, old.reasons) == ({}, {}, marker.reasons)
    tally = Tally(1, 3)
    count(tally, old)
    (reason,) = reasons_of(tally)
    assert reason.example is None
    assert reason_lines([reason], "out")[0] == "  1 null-prompt"


def test_reasons_come_with_an_example_and_add_up(output: tuple[Plan, Ledger]) -> None:
    tally = tallied(output)
    assert (tally.accepted, tally.rejected, tally.failed, tally.truncated) == (5, 3, 4, 2)
    reasons = reasons_of(tally)
    assert [(one.reason, one.count) for one in reasons] == [
        ("RuntimeError", 3),
        ("null-prompt", 2),
        ("flat-image", 1),
        ("non-finite", 1),
    ]
    assert sum(one.count for one in reasons) == tally.rejected + tally.failed
    assert reasons[0].example == Example("shard 3", "out of memory")
    lines = reason_lines(reasons, "out")
    assert lines[1].startswith("  2 null-prompt, e.g. in-00000001-v0: column 'prompt'")
    assert lines[-1] == "  all of them: `batchgen rejects out`"


def test_only_the_most_frequent_reasons_are_told() -> None:
    tally = Tally(1, 100)
    tally.note({f"reason-{number}": number for number in range(1, 9)}, {})
    lines = reason_lines(reasons_of(tally), "out")
    assert lines[0] == "  8 reason-8"
    assert lines[5:] == ["  and 3 more reasons: `batchgen rejects out`"]


def test_an_example_is_short_and_one_line() -> None:
    image = "data:image/png;base64," + "A" * 100_000
    event = FailedMarker(0, 4, "RetryShard", f"two\nlines {image}", "", 3, "host", 0.0)
    tally = Tally(1, 4)
    count(tally, event)
    example = tally.examples["RetryShard"]
    assert len(example.message) <= 300 and "\n" not in example.message


def test_status_tells_the_reasons(output: tuple[Plan, Ledger]) -> None:
    url = output[1].store.url
    told = invoke("status", url)
    assert "  3 RuntimeError, e.g. shard 3: out of memory" in told.output
    assert "  2 null-prompt, e.g. in-00000001-v0: column 'prompt' is null" in told.output
    facts = json.loads(invoke("status", url, "--json").output)
    assert facts["reasons"][1] == {
        "reason": "null-prompt",
        "count": 2,
        "example": {
            "key": "in-00000001-v0",
            "message": "column 'prompt' is null; a prompt is needed",
        },
    }
    assert facts["truncated_prompts"] == 2


def test_rejects_lists_all_by_reason(output: tuple[Plan, Ledger]) -> None:
    url = output[1].store.url
    told = invoke("rejects", url)
    assert told.exit_code == 0
    assert told.output.splitlines()[:5] == [
        "3 RuntimeError",
        "  shard 3: out of memory",
        "2 null-prompt",
        "  in-00000001-v0 (in.parquet#1): column 'prompt' is null; a prompt is needed",
        "  in-00000005-v0 (in.parquet#5): column 'prompt' is null; a prompt is needed",
    ]
    groups = json.loads(invoke("rejects", url, "--json", "--limit", "0").output)
    samples = [one for group in groups for one in group["samples"]]
    assert len(samples) == 5
    assert samples[1]["source_id"] == "in.parquet#1" and samples[1]["outcome"] == "rejected"


def test_rejects_of_one_reason_and_no_more_than_asked(output: tuple[Plan, Ledger]) -> None:
    url = output[1].store.url
    told = invoke("rejects", url, "--reason", "null-prompt", "--limit", "1")
    assert told.output.splitlines() == [
        "2 null-prompt",
        "  in-00000001-v0 (in.parquet#1): column 'prompt' is null; a prompt is needed",
    ]
    told = invoke("rejects", url, "--reason", "empty-prompt")
    assert told.output == "no sample was rejected or failed with the reason empty-prompt\n"


def test_rejects_are_read_no_further_than_needed(
    output: tuple[Plan, Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()
    whole = type(output[1].store).read

    def counting(store: Any, name: str) -> bytes:
        read.append(name)
        return whole(store, name)

    monkeypatch.setattr(type(output[1].store), "read", counting)
    by_reason(output[1], "null-prompt", limit=1)
    assert [name for name in read if "rejects" in name] == ["_batchgen/rejects/00000.parquet"]


def test_rejects_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [None, "x"]}), tmp_path / "in.parquet")
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out")
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make_output(plan, ledger)
    (tmp_path / "out" / "_batchgen" / "rejects" / "00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"rejects/00000\.parquet cannot be read.*verify"):
        by_reason(ledger)


def test_control_characters_and_secrets_of_a_message_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET_KEY", "hunter2hunter2")
    plan = plan_for(_table(tmp_path, ["x"]), tmp_path / "out")
    ledger = Ledger(open_store(str(tmp_path / "out")))
    ledger.freeze(plan, plan.spec)
    message = "\x1b]0;mine\x07 hunter2hunter2"
    ledger.fail(FailedMarker(0, 1, "RuntimeError", message, "", 1, "host", 0.0))
    for command in ("status", "rejects"):
        told = invoke(command, str(tmp_path / "out")).output
        assert r"\x1b]0;mine\x07" in told and "\x1b" not in told
        assert "hunter2" not in told


def _table(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"prompt": texts}), folder / "in.parquet")
    return folder / "in.parquet"


def shards_of(plan: Plan, shares: list[float], marker: Marker, made: bool = True) -> Tally:
    """A run that finished shards of 50 samples with these fractions of rejects."""
    policy = plan.spec.policy
    tally = Tally(plan.shards, plan.samples, policy.failed_limit, policy.rejected_limit)
    add(tally, shares, marker, made)
    return tally


def add(tally: Tally, shares: list[float], marker: Marker, made: bool = True) -> None:
    for share in shares:
        rejected = round(50 * share)
        counts = Counts(50, 50 - rejected, rejected, 0)
        count(tally, replace(marker, counts=counts, reasons={"null-prompt": rejected}), made)


@pytest.fixture
def marker(output: tuple[Plan, Ledger]) -> Marker:
    found = output[1].marker(0)
    assert found is not None
    return found


JOB: dict[str, Any] = {"output__samples_per_shard": 50}


@pytest.mark.parametrize(
    ("shares", "limit", "stops"),
    [
        ([1.0] * 2, 0.1, False),  # may be an accident
        ([1.0] * 3, 0.1, True),
        ([0.6] * 3, 0.1, False),  # fewer than 100
        ([0.6] * 4, 0.1, True),
        ([0.5] * 20, 0.1, False),  # above the limit, but half of the images are good
        ([0.0] * 10 + [1.0] * 3, 0.1, False),
        ([1.0] * 3, 0.9, True),
        ([0.94] * 20, 0.9, False),
        ([1.0] * 20, 1.0, False),
    ],
)
def test_far_too_many_rejects_stop_a_run(
    marker: Marker, shares: list[float], limit: float, stops: bool
) -> None:
    plan = paper_plan([[1000]], policy__rejected_limit=limit, **JOB)
    said = hopeless(plan, shards_of(plan, shares, marker))
    assert bool(said) == stops
    if stops:
        assert f"policy.rejected_limit ({limit:g})" in said
        assert f"batchgen run {plan.spec.output.url}/_batchgen/job.yaml --set policy." in said


def test_what_earlier_runs_made_counts_for_a_run_that_meets_bad_rows(marker: Marker) -> None:
    plan = paper_plan([[10_000]], **JOB)
    tally = shards_of(plan, [0.0] * 90, marker, made=False)
    add(tally, [1.0] * 4, marker)
    assert not hopeless(plan, tally)  # 200 of 4,700 so far
    add(tally, [1.0] * 7, marker)
    assert hopeless(plan, tally)


def test_going_on_after_a_stop_stops_again_only_for_new_rejects(marker: Marker) -> None:
    plan = paper_plan([[1000]], **JOB)
    tally = shards_of(plan, [1.0] * 3, marker, made=False)
    add(tally, [0.0] * 3, marker)
    assert not hopeless(plan, tally)


def test_the_verdict_names_what_was_cut(output: tuple[Plan, Ledger]) -> None:
    plan = output[0]
    tally = Tally(1, 10, committed=1, accepted=10, truncated=1234)
    assert "1,234 of them from truncated prompts, which were too long" in verdict(plan, tally)[1]
    tally.truncated = 0
    assert "too long" not in verdict(plan, tally)[1]
