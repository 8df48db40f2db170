"""Several runs on one plan, each with its own range of shards, complete one output."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen import runner
from batchgen.errors import SpecError
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Outcome
from batchgen.output.shard_range import parse_range
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.datasets_on_disk import paper_plan
from tests.outputs import digests_of, spec_for


@pytest.mark.parametrize(
    ("text", "part"),
    [("0:2", (0, 2)), (":2", (0, 2)), ("3:", (3, 5)), (":", (0, 5)), ("4:5", (4, 5))],
)
def test_parts_are_read(text: str, part: tuple[int, int]) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    assert parse_range(text, plan.shards) == part
    assert parse_range(None, plan.shards) is None


@pytest.mark.parametrize("text", ["3", "2:2", "3:2", "0:6", "-1:2", "a:b", "1:2:3", ""])
def test_what_is_no_part_of_the_plan_is_refused(text: str) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    with pytest.raises(SpecError, match=r"--shards: got .* 0 <= A < B <= 5"):
        parse_range(text, plan.shards)


@pytest.mark.usefixtures("ray_session")
def test_two_runs_at_once_make_what_one_makes(prompts: Callable[..., Path], tmp_path: Path) -> None:
    source = prompts(11)
    assert runner.run(spec_for(source, tmp_path / "one"), quiet=True).exit_code == 0
    spec, outcomes = spec_for(source, tmp_path / "two"), dict[str, Outcome]()

    def make(shards: str) -> None:
        outcomes[shards] = runner.run(spec, quiet=True, shards=shards)

    threads = [threading.Thread(target=make, args=(shards,)) for shards in ("0:1", "1:3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = outcomes["0:1"], outcomes["1:3"]
    assert (first.exit_code, first.shards, first.planned) == (0, 1, 4)
    assert (second.exit_code, second.shards, second.planned) == (0, 2, 7)
    assert digests_of(tmp_path / "two") == digests_of(tmp_path / "one")
    ledger = Ledger(open_store(str(tmp_path / "two")))
    findings = verify(ledger)
    assert findings.ok and findings.accepted == 11
    assert [marker.attempt for marker in ledger.markers(range(3))] == [1, 1, 1]
    assert (tmp_path / "two" / "_batchgen" / "report.html").exists()  # of the one that ended last
    said = sorted(outcome.message.partition(";")[2] for outcome in outcomes.values())
    assert any("no other shard is pending" in text for text in said), said
