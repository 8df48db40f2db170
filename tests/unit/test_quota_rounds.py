"""Quotas and remade samples: what is counted, what ends the rounds, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchgen.cli import main
from batchgen.curate.rounds import check_rounds, in_rounds
from batchgen.errors import SpecError
from batchgen.output.ledger import rejects_name
from batchgen.output.outcome import Outcome
from batchgen.plan.plan import Plan
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
