"""Quotas and remade samples: what is counted, what ends the rounds, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchgen.cli import main
from batchgen.curate.groups import groups_of
from batchgen.curate.rounds import check_rounds, in_rounds
from batchgen.curate.selection import selected_keys
from batchgen.errors import SpecError
from batchgen.output.extension import Extension, extend, further_parts
from batchgen.output.ledger import rejects_name
from batchgen.output.outcome import Outcome
from batchgen.output.quota_record import quota_of
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from tests import arithmetic_stages
from tests.datasets_on_disk import plan_for
from tests.unit.test_quota import Runs, plan_with

CLI = CliRunner()
ASKED = {"per": ["label"], "accepted": 7, "where": "seed % 10 < 3", "budget": 400}


@pytest.mark.parametrize("where", ["size", "(seed % 10 < 3)::int", "kind", "nothing > 1"])
def test_what_is_no_condition_is_refused(where: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"quota\.where"):
        check_rounds(plan_with(tmp_path, quota={**ASKED, "where": where}))
    check_rounds(plan_with(tmp_path, quota={**ASKED, "where": "size > 1 -- large"}))


def plan_of(folder: Path, columns: dict[str, Any], **dotted: Any) -> Plan:
    """A plan of these rows, in shards of four samples."""
    if not (folder / "in.parquet").exists():
        pq.write_table(pa.table(columns), folder / "in.parquet")
    fields: dict[str, Any] = {"output__samples_per_shard": 4, "resources__batch_size": 2}
    return plan_for(folder / "in.parquet", folder / "out", **{**fields, **dotted})


def status(runs: Runs) -> tuple[int, str]:
    told = CLI.invoke(main, ["status", runs.plan.spec.output.url])
    return told.exit_code, told.output


def test_a_file_that_is_lost_in_a_round_ends_the_run(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "flat b", "a", "flat c"], "label": ["cat", "dog", "fox", "dog"]}
    quota = {"accepted": 12, "budget": 400}
    runs = Runs(plan_of(tmp_path, columns, input__columns__label="label", quota=quota))
    passes: list[int] = []

    def make(*, shards: str | None, overwrite: bool = False) -> Outcome:
        if passes:
            (tmp_path / "out" / rejects_name(0)).unlink(missing_ok=True)
        outcome = runs.make(shards=None)
        passes.append(outcome.exit_code)
        return outcome

    outcome = in_rounds(runs.plan.spec, make, None, say=runs.said.append)
    assert passes == [0, 4] and outcome.exit_code == 4 and "lost" in outcome.message
    assert status(runs)[0] == 4


@pytest.mark.parametrize(("budget", "code"), [(400, 0), (16, 2)])
def test_failed_samples_of_a_quota(budget: int, code: int, tmp_path: Path) -> None:
    """Run and status agree: failed samples do not matter if others took their places."""
    columns = {"prompt": ["a", "broken b", "a", "a"] * 3, "label": ["cat", "dog", "fox"] * 4}
    quota = {"per": ["label"], "accepted": 5, "budget": budget}
    runs = Runs(plan_of(tmp_path, columns, input__columns__label="label", quota=quota))
    outcome = runs.run()
    assert outcome.exit_code == code and "samples failed" in outcome.message
    assert ("others took their places" in outcome.message) is (code == 0)
    told = status(runs)
    assert told[0] == code and outcome.message in told[1]


def test_rows_of_other_splits_get_no_candidates(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a"] * 12,
        "label": ["cat", "dog", "fox", "cow"] * 3,
        "split": ["train", "training", "train", "test"] * 3,
    }
    quota = {"per": ["label"], "accepted": 5, "budget": 15}
    settings: dict[str, Any] = {"input__columns__label": "label", "input__splits": ["train"]}
    runs = Runs(plan_of(tmp_path, columns, **settings, quota=quota))
    outcome = runs.run()
    assert outcome.exit_code == 0, outcome.message
    record = quota_of(runs.ledger)
    assert record is not None
    told = [(one.name, one.accepted, one.candidates) for one in record.groups]
    assert told == [("cat", 5, 5), ("dog", 5, 5), ("fox", 5, 5)]
    named = {**quota, "accepted": {"cow": 5}}
    with pytest.raises(SpecError, match="groups of the rows: cat, dog, fox"):
        check_rounds(plan_of(tmp_path, columns, **settings, quota=named))
    with pytest.raises(SpecError, match=r"input\.splits.*no row"):
        settings["input__splits"] = ["validation"]
        check_rounds(plan_of(tmp_path, columns, **settings, quota=quota))


def test_groups_are_told_apart_by_their_values(tmp_path: Path) -> None:
    columns = {
        "prompt": ["p"] * 5,
        "x": ["a, b", "a", "null", None, "plain"],
        "y": ["c", "b, c", "z", "z", "z"],
        "n": [1.0, 2.0, float("nan"), None, 3.0],
    }
    plan = plan_of(tmp_path, columns)
    found = groups_of(plan, 5, ["x", "y"])
    assert [found.names[number] for number in found.of_row] == [
        *('"a, b", "c"', '"a", "b, c"', '"null", "z"', 'null, "z"', "plain, z")
    ]
    assert set(groups_of(plan, 5, ["x"]).names) == {"a, b", "a", '"null"', "null", "plain"}
    bins = groups_of(plan, 5, ["n"], bins=2)
    assert [bins.names[number] for number in bins.of_row] == [
        *("bin 1 of 2", "bin 2 of 2", "nan", "null", "bin 2 of 2")
    ]


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), float("nan"), 1e308])
def test_only_finite_scores_lead_the_candidates(score: float, tmp_path: Path) -> None:
    columns = {
        "prompt": ["a"] * 12,
        "label": ["cat", "dog", "fox"] * 4,
        "side": ["x", "y"] * 6,
        "hard": [score, score, *[1.0] * 10],
    }
    follow = {"score": "hard", "cells": ["side"]}
    quota = {"per": ["label"], "accepted": 12, "where": "seed % 10 < 4", "budget": 300}
    settings: dict[str, Any] = {"input__columns__label": "label"}
    runs = Runs(plan_of(tmp_path, columns, **settings, quota={**quota, "follow": follow}))
    outcome = runs.run()
    assert outcome.exit_code == 0, outcome.message


def test_remaking_counts_for_each_sample(tmp_path: Path) -> None:
    remake = {"reasons": ["flat-image"], "rounds": 2}
    columns = {"prompt": ["a", "flat b"] * 3}
    settings = {"policy__remake": remake, "policy__rejected_limit": 1.0}
    runs = Runs(plan_of(tmp_path, columns, **settings))
    assert runs.run().exit_code == 0
    extend(runs.ledger, further_parts(runs.ledger, Extension(variants=1), runs.plan.spec))
    assert runs.run().exit_code == 0
    told = [(one.place.why, one.place.round, one.samples) for one in runs.ledger.parts()]
    assert told == [
        *(("", 0, 6), ("remake", 1, 3), ("remake", 2, 3)),
        *(("variants", 0, 6), ("remake", 3, 3), ("remake", 4, 3)),
    ]
    assert verify(runs.ledger).ok


def test_the_selection_of_a_quota_is_not_replaced(tmp_path: Path) -> None:
    runs = Runs(plan_with(tmp_path))
    assert runs.run().exit_code == 0
    command = ["select", runs.plan.spec.output.url, "--where", "seed % 2 = 0", "--name"]
    refused = CLI.invoke(main, [*command, "quota"])
    assert refused.exit_code == 1 and "use another name" in refused.output
    assert len(selected_keys(runs.ledger, runs.ledger.parts(), "quota")) == 21
    assert CLI.invoke(main, [*command, "even"]).exit_code == 0


def test_status_knows_the_record_of_another_quota(tmp_path: Path) -> None:
    """A larger quota was asked for, and its run was killed before the rounds."""
    met = Runs(plan_with(tmp_path, quota={**ASKED, "where": "", "accepted": 4}))
    assert met.run().exit_code == 0 and status(met)[0] == 0
    more = Runs(plan_with(tmp_path, quota={**ASKED, "where": "", "accepted": 8}))
    more.ledger.keep_job(more.plan.spec)
    code, told = status(more)
    assert code == 3 and "the quota is not met yet" in told
    assert more.run().exit_code == 0 and status(more)[0] == 0
    extend(more.ledger, further_parts(more.ledger, Extension(variants=1), more.plan.spec))
    more.make(shards=None)
    assert status(more)[0] == 3  # the record does not count the new part
    data = json.loads(more.ledger.store.read("_batchgen/quota.json"))
    old = {name: value for name, value in data.items() if name not in ("asked", "parts")}
    more.ledger.store.put("_batchgen/quota.json", json.dumps(old).encode())
    assert status(more)[0] == 0  # as older versions wrote it


def test_a_group_that_an_extension_brought_can_be_named(tmp_path: Path) -> None:
    columns = {"prompt": ["a"] * 9, "label": [*["cat", "dog"] * 3, *["fox"] * 3]}
    settings: dict[str, Any] = {"input__columns__label": "label", "input__limit": 6}
    runs = Runs(plan_of(tmp_path, columns, **settings, quota={"per": ["label"], "accepted": 3}))
    assert runs.run().exit_code == 0
    named = {"per": ["label"], "accepted": {"fox": 4}, "budget": 300}
    plan = plan_of(tmp_path, columns, **settings, quota=named)
    with pytest.raises(SpecError, match="groups of the rows: cat, dog"):
        Runs(plan).run()
    extend(runs.ledger, further_parts(runs.ledger, Extension(limit=3), runs.plan.spec))
    outcome = Runs(plan).run()
    assert outcome.exit_code == 0, outcome.message
    assert outcome.message.startswith("quota: 1 of 1 groups are full; 4 samples")


def test_a_rank_that_is_not_a_number_is_the_last(tmp_path: Path) -> None:
    by = "case when seed % 2 = 0 then 'nan'::double else seed end"
    runs = Runs(plan_with(tmp_path, quota={"accepted": 3, "by": by, "budget": 60}))
    assert runs.run().exit_code == 0
    table = pq.read_table(tmp_path / "out" / "data", columns=["key", "seed"]).to_pylist()
    seeds = sorted((one["seed"] for one in table if one["seed"] % 2), reverse=True)
    keys = selected_keys(runs.ledger, runs.ledger.parts(), "quota")
    kept = sorted((one["seed"] for one in table if one["key"] in keys), reverse=True)
    assert kept[:2] == seeds[:2] and len(kept) == 3 and len(seeds) > 2


@pytest.mark.parametrize("accepted", [{"cat": 0}, {"cat": 1.5}, {"cat": True}, True, 0, 1.5, {}])
def test_a_wanted_number_is_a_whole_one(accepted: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"quota\.accepted.*number") as refused:
        plan_with(tmp_path, quota={**ASKED, "accepted": accepted})
    assert "constrained" not in str(refused.value)


def test_groups_may_be_named_by_numbers(tmp_path: Path) -> None:
    quota = {"per": ["kind"], "accepted": {1: 2}}
    plan = plan_of(tmp_path, {"prompt": ["a"] * 4, "kind": [0, 1, 0, 1]}, quota=quota)
    assert Runs(plan).run().exit_code == 0


@pytest.mark.parametrize("budget", ["9" * 400 + "x", 10**30, "0x", True, -1])
def test_a_budget_has_bounds(budget: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"quota\.budget"):
        plan_with(tmp_path, quota={**ASKED, "budget": budget})


@pytest.mark.parametrize("outcome", ["rejected", "failed"])
def test_samples_that_were_made_again_do_not_count_twice(
    outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = {"rejected": "flat", "failed": "broken"}[outcome]
    columns = {"prompt": ["a", f"{word} b", "a", f"{word} c"]}
    runs = Runs(plan_of(tmp_path, columns, policy__rejected_limit=0.3))
    assert runs.run().exit_code == 2 and status(runs)[0] == 2
    more = further_parts(runs.ledger, Extension(again=outcome), runs.plan.spec)
    extend(runs.ledger, more)
    still = runs.run()  # the new samples are as bad
    assert still.exit_code == 2 and still.message.startswith("2 of 4 samples")
    extend(runs.ledger, further_parts(runs.ledger, Extension(again=outcome), runs.plan.spec))
    monkeypatch.setattr(arithmetic_stages, "_facts", lambda one, *_: [one.seed, 1, False, False])
    mended = runs.run()
    assert mended.exit_code == 0, mended.message
    assert "4 of these were made again" in mended.message
    assert status(runs)[0] == 0 and mended.message in status(runs)[1]
