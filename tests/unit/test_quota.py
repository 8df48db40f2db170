"""Quotas: rounds that follow from committed shards only, whatever happens in between."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.curate import quota as quotas
from batchgen.curate.candidates import cell_weights, chosen_rows, needs, shares
from batchgen.curate.groups import Groups, groups_of
from batchgen.curate.rounds import check_rounds, in_rounds
from batchgen.curate.selection import selected_keys
from batchgen.errors import InputError, OutputBusy, SpecError
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Outcome
from batchgen.output.quota_record import quota_of
from batchgen.output.tally import Tally
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.report.finalize import finalize
from batchgen.storage import open_store
from tests.arithmetic_stages import arithmetic_stages
from tests.datasets_on_disk import plan_for
from tests.outputs import digests_of

KINDS = ["cat", "dog", "fox"]


def plan_with(folder: Path, **dotted: Any) -> Plan:
    """Twelve rows of three kinds; about three of ten images count."""
    table = pa.table(
        {
            "prompt": [f"p{number}" for number in range(12)],
            "kind": KINDS * 4,
            "template": ["a", "b"] * 6,
            "size": list(range(12)),
        }
    )
    folder.mkdir(exist_ok=True)
    if not (folder / "in.parquet").exists():
        pq.write_table(table, folder / "in.parquet")
    fields = {
        "output__samples_per_shard": 4,
        "input__columns__label": "kind",
        "resources__batch_size": 2,
        "quota": {"per": ["label"], "accepted": 7, "where": "seed % 10 < 3", "budget": 400},
    }
    return plan_for(folder / "in.parquet", folder / "out", **{**fields, **dotted})


class Runs:
    """Runs of this process, without Ray; each may be killed after some shards."""

    def __init__(self, plan: Plan, shuffled: random.Random | None = None) -> None:
        self.plan, self.random = plan, shuffled
        self.ledger = Ledger(open_store(plan.spec.output.url))
        self.kill_after: int | None = None
        self.said: list[str] = []

    def make(self, *, shards: str | None, overwrite: bool = False) -> Outcome:
        """One pass; raises KeyboardInterrupt where the run is killed."""
        if self.ledger.plan() is None:
            self.ledger.freeze(self.plan, self.plan.spec)
        parts = self.ledger.parts()
        pending = self.ledger.states(parts).pending
        if self.random:
            self.random.shuffle(pending)
        for shard in pending:
            if self.kill_after is not None:
                if not self.kill_after:
                    raise KeyboardInterrupt
                self.kill_after -= 1
            self.commit(shard)
        return finalize(parts, self.ledger, Tally(parts.shards, parts.samples))

    def commit(self, shard: int) -> None:
        from batchgen.input.reader import make_spans, read_columns, read_span

        plan = self.ledger.parts().of(shard)
        columns = read_columns(plan.spec, [name for name, _ in plan.columns])
        (span,) = make_spans(plan, [shard])
        for rows in read_span(span, plan.spec, columns):
            arithmetic_stages()(rows, plan, self.ledger, attempt=1)

    def run(self) -> Outcome:
        check_rounds(self.plan, self.ledger)
        return in_rounds(self.plan.spec, self.make, None, say=self.said.append)


def selected(ledger: Ledger) -> dict[str, str]:
    """key -> sha256 of the samples in the selection."""
    keys = selected_keys(ledger, ledger.parts(), "quota")
    folder = Path(ledger.store.path("data")).parent
    return {key: digest for key, digest in digests_of(folder).items() if key in keys}


def kinds_of(ledger: Ledger) -> Counter[str]:
    return Counter(KINDS[int(key.split("-")[1]) % 3] for key in selected(ledger))


def test_each_group_gets_exactly_its_number(tmp_path: Path) -> None:
    runs = Runs(plan_with(tmp_path))
    outcome = runs.run()
    assert outcome.exit_code == 0, outcome.message
    assert outcome.message.startswith("quota: 3 of 3 groups are full; 21 samples in the selection")
    assert kinds_of(runs.ledger) == dict.fromkeys(KINDS, 7)
    parts = runs.ledger.parts()
    assert len(parts) > 2 and {plan.place.why for plan in parts[1:]} == {"quota"}
    assert [plan.place.round for plan in parts] == list(range(len(parts)))
    found = verify(runs.ledger)
    assert found.ok, found.problems
    record = quota_of(runs.ledger)
    assert record is not None and not record.lacking and record.rounds == len(parts)
    assert sum(one.candidates for one in record.groups) == parts.samples
    assert all(one.low < one.rate < one.high for one in record.groups)
    assert "<h2>Quota</h2>" in runs.ledger.store.read("_batchgen/report.html").decode()
    card = runs.ledger.store.read("README.md").decode()
    assert "## Quota" in card and "| cat | 7 |" in card
    assert any("more candidates" in line for line in runs.said)
    again = runs.run()
    assert (again.exit_code, len(runs.ledger.parts())) == (0, len(parts))


@pytest.mark.parametrize("seed", range(6))
def test_kills_anywhere_change_nothing(seed: int, tmp_path: Path) -> None:
    whole = Runs(plan_with(tmp_path / "whole"))
    assert whole.run().exit_code == 0
    dice = random.Random(seed)
    runs = Runs(plan_with(tmp_path / "killed"), shuffled=dice)
    kills = 0
    while True:
        runs.kill_after = dice.randrange(0, 6)
        with suppress(KeyboardInterrupt):
            outcome = runs.run()
            break
        kills += 1
    assert kills and outcome.exit_code == 0
    assert selected(runs.ledger) == selected(whole.ledger)
    assert [one.listed.rows.tolist() for one in runs.ledger.parts()[1:]] == [
        one.listed.rows.tolist() for one in whole.ledger.parts()[1:]
    ]
    assert verify(runs.ledger).ok


def test_two_runs_plan_the_same_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find that all is committed; the second takes over the plan of the first."""
    whole, runs = Runs(plan_with(tmp_path / "whole")), Runs(plan_with(tmp_path / "two"))
    assert whole.run().exit_code == 0
    add = Ledger.add_part

    def both(ledger: Ledger, plan: Plan) -> bool:
        other = quotas.next_round(
            ledger.parts(),
            plan.spec.quota,
            quotas.standing_of(ledger, ledger.parts(), plan.spec.quota),  # type: ignore[arg-type]
        )
        assert other is not None and other.to_json() == plan.to_json()
        assert add(ledger, other)
        return add(ledger, plan)

    monkeypatch.setattr(Ledger, "add_part", both)
    assert runs.run().exit_code == 0
    assert selected(runs.ledger) == selected(whole.ledger)


def test_a_round_that_another_run_holds_is_left_to_it(tmp_path: Path) -> None:
    runs = Runs(plan_with(tmp_path))

    def make(*, shards: str | None, overwrite: bool = False) -> Outcome:
        if len(runs.ledger.store.list("_batchgen/parts")):
            raise OutputBusy("held by another run")
        return runs.make(shards=None)

    outcome = in_rounds(runs.plan.spec, make, "0:3", say=runs.said.append)
    assert (
        outcome.exit_code == 3 and "round 1 is planned, but another run holds it" in outcome.message
    )
    assert runs.run().exit_code == 0


def test_a_budget_that_is_used_up_says_what_is_lacking(tmp_path: Path) -> None:
    asked = {"per": ["label"], "accepted": 9, "where": "seed % 10 < 3", "budget": 40}
    runs = Runs(plan_with(tmp_path, quota=asked))
    outcome = runs.run()
    assert outcome.exit_code == 2
    assert "The budget (40) is used up: " in outcome.message
    assert runs.ledger.parts().samples == 40
    assert set(kinds_of(runs.ledger)) <= set(KINDS)
    more = Runs(plan_with(tmp_path, quota={**asked, "budget": "30x"}))
    assert more.run().exit_code == 0  # a resume with a larger budget continues
    assert kinds_of(more.ledger) == dict.fromkeys(KINDS, 9)


def test_rounds_that_are_used_up(tmp_path: Path) -> None:
    asked = {"per": ["label"], "accepted": 50, "where": "seed % 10 < 1", "budget": 500, "rounds": 1}
    outcome = Runs(plan_with(tmp_path, quota=asked)).run()
    assert outcome.exit_code == 2
    assert "All 1 rounds (quota.rounds) are used up" in outcome.message


def test_only_named_groups_get_candidates(tmp_path: Path) -> None:
    asked = {"per": ["kind"], "accepted": {"dog": 12}, "where": "seed % 10 < 3", "budget": 400}
    runs = Runs(plan_with(tmp_path, quota=asked))
    assert runs.run().exit_code == 0
    assert kinds_of(runs.ledger) == {"dog": 12}
    for plan in runs.ledger.parts()[1:]:
        assert {row % 3 for row in plan.listed.rows.tolist()} == {1}


def test_a_rank_decides_which_samples_stay(tmp_path: Path) -> None:
    asked = {"per": ["label"], "accepted": 2, "by": "seed", "lowest": True, "budget": 60}
    runs = Runs(plan_with(tmp_path, quota=asked))
    assert runs.run().exit_code == 0
    table = pq.read_table(tmp_path / "out" / "data").select(["key", "label", "seed"]).to_pylist()
    expected = {
        row["key"]
        for kind in KINDS
        for row in sorted(
            (one for one in table if one["label"] == kind), key=lambda one: one["seed"]
        )[:2]
    }
    assert selected(runs.ledger).keys() == expected


def test_rounds_follow_the_hardest_cells(tmp_path: Path) -> None:
    asked = {
        "per": ["label"],
        "accepted": 40,
        "where": "seed % 10 < 5",
        "budget": 900,
        "follow": {"score": "pixel_mean", "cells": ["template", "size"], "bins": 2},
    }
    runs = Runs(plan_with(tmp_path, quota=asked))
    assert runs.run().exit_code == 0
    hard = {**asked, "follow": {**asked["follow"], "score": "variant", "floor": 0.0}}
    spec = plan_with(tmp_path, quota=hard).spec
    assert spec.quota is not None
    parts = runs.ledger.parts()
    standing = quotas.standing_of(runs.ledger, parts, spec.quota)
    cells, weights = quotas._followed(parts, spec.quota, standing)
    assert set(cells.names) == {"a, bin 1 of 2", "a, bin 2 of 2", "b, bin 1 of 2", "b, bin 2 of 2"}
    scores = standing.table.column("score").to_numpy()
    for group, own in enumerate(weights):
        assert own is not None and own.sum() == pytest.approx(1)
        means = {}
        for cell in range(len(cells.names)):
            of_group = standing.groups.of_row[standing.rows] == group
            inside = standing.fits & of_group & (cells.of_row[standing.rows] == cell)
            if inside.any():
                means[cell] = scores[inside].mean()
        order = sorted(means, key=lambda cell: means[cell])
        assert sorted(means, key=lambda cell: own[cell]) == order  # the hardest cell gets the most


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"accepted": 0}, "quota.accepted"),
        ({"accepted": 5, "budget": 0}, "a number of candidates of 1 or more"),
        ({"accepted": 5, "budget": "0x"}, "a number of candidates of 1 or more"),
        ({"accepted": 5, "budget": "many"}, "a multiple such as 4x"),
        ({"accepted": 5, "budget": 11}, "at least the 12 samples of the first round"),
        ({"accepted": 5, "per": ["labl"]}, "did you mean 'label'"),
        ({"accepted": 5, "per": ["class_label"]}, "input.columns.class_label"),
        ({"accepted": {"cow": 3}, "per": ["label"]}, "groups of the rows: cat, dog, fox"),
        ({"accepted": 5, "where": "seeed > 1"}, "seeed"),
        ({"accepted": 5, "where": "kind > "}, "cannot be evaluated"),
        ({"accepted": 5, "by": "margin"}, "margin"),
        ({"accepted": 5, "follow": {"score": "entropy", "cells": ["label"]}}, "quota.follow.score"),
        ({"accepted": 5, "follow": {"score": "kind", "cells": ["labels"]}}, "quota.follow.cells"),
        ({"accepted": 5, "follow": {"score": "prompt", "cells": []}}, "quota.follow.cells"),
    ],
)
def test_a_wrong_quota_is_refused_before_work(
    asked: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises((SpecError, InputError), match=words):
        plan = plan_with(tmp_path, quota={"budget": 100, **asked})
        check_rounds(plan)


def test_without_duckdb_a_quota_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(InputError, match=r"pip install 'batchgen\[curate\]'"):
        check_rounds(plan)


def test_rejected_samples_are_made_again_in_rounds(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b flat", None]})
    pq.write_table(table, tmp_path / "in.parquet")
    remake = {"reasons": ["flat-image"], "rounds": 2}
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", policy__remake=remake)
    runs = Runs(plan)
    assert runs.run().exit_code == 2  # a flat image stays flat, whatever the seed
    parts = runs.ledger.parts()
    assert [plan.place.why for plan in parts] == ["", "remake", "remake"]
    assert [plan.listed.instead_of.tolist() for plan in parts[1:]] == [[0], [1]]
    assert [plan.listed.variants.tolist() for plan in parts[1:]] == [[1], [2]]
    assert verify(runs.ledger).ok
    for wrong, words in (
        ({"reasons": ["null-prompt"]}, "flat-image"),
        ({"reasons": []}, "reasons"),
    ):
        with pytest.raises(SpecError, match=words):
            other = plan_for(tmp_path / "in.parquet", tmp_path / "out", policy__remake=wrong)
            check_rounds(other)
    both = plan_for(
        tmp_path / "in.parquet", tmp_path / "o", policy__remake=remake, quota={"accepted": 1}
    )
    with pytest.raises(SpecError, match="remove one of the two"):
        check_rounds(both)


def test_a_quota_without_an_input_is_one_group(tmp_path: Path) -> None:
    asked = {"accepted": 8, "where": "seed % 2 = 0", "budget": 90}
    fields: dict[str, Any] = {"input__count": 5, "task": "unconditional", "quota": asked}
    runs = Runs(plan_for("", tmp_path / "out", **fields))
    assert runs.run().exit_code == 0
    assert len(selected(runs.ledger)) == 8


@given(total=st.integers(0, 1000), weights=st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_shares_add_up(total: int, weights: list[int]) -> None:
    given_shares = shares(total, np.array(weights))
    assert given_shares.sum() == (total if any(weights) else 0)
    for share, weight in zip(given_shares.tolist(), weights, strict=True):
        exact = total * weight / sum(weights) if any(weights) else 0
        assert abs(share - exact) < 1 and (weight or not share)


@settings(max_examples=60)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(0, 60)),
        min_size=1,
        max_size=8,
    ),
    left=st.integers(1, 500),
)
def test_needs_stay_in_the_budget(groups: list[tuple[int, int, int]], left: int) -> None:
    deficits, accepted, more = np.array(groups).T
    needed = needs(deficits, accepted, accepted + more, left)
    assert needed.sum() <= left and (needed[deficits == 0] == 0).all()
    if needed.sum() < left:
        assert (needed >= deficits).all()


@given(
    means=st.lists(st.floats(-5, 5) | st.just(float("nan")), min_size=1, max_size=9),
    floor=st.floats(0, 1),
    lowest=st.booleans(),
)
def test_cells_have_a_floor(means: list[float], floor: float, lowest: bool) -> None:
    weights = cell_weights(np.array(means), floor, lowest)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= floor / len(means) - 1e-9).all()


def test_rows_with_the_fewest_candidates_come_first() -> None:
    groups = Groups(("a", "b"), np.array([0, 0, 1, 0]))
    rows = chosen_rows(np.array([4, 2]), groups, groups, [None, None], np.array([2, 0, 1, 1]))
    assert Counter(rows) == {1: 2, 3: 1, 0: 1, 2: 2}


def test_bins_have_equal_numbers_of_rows(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["p"] * 9, "x": [9, 1, None, 3, 4, 5, 6, 7, 8]}),
        tmp_path / "in.parquet",
    )
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out")
    found = groups_of(plan, 9, ["x"], bins=4)
    counts = Counter(found.names[number] for number in found.of_row)
    assert counts == {"null": 1, **{f"bin {place} of 4": 2 for place in range(1, 5)}}
