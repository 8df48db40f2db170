"""Score sets and selections of an output in a bucket."""

from __future__ import annotations

from pathlib import Path

from batchgen.curate.columns import columns_of
from batchgen.curate.score_sets import score_sets
from batchgen.curate.selection import Query, select, selected_keys
from batchgen.output.ledger import Ledger
from batchgen.output.score_set import set_names
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_prompts
from tests.unit.test_score_sets import HASH, TWICE, keys, stored


def test_scores_in_a_bucket_are_selected_by(s3_bucket: str, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "in.parquet", 12)
    plan = plan_for(source, f"{s3_bucket}/out", output__samples_per_shard=4)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    stored(ledger, "numbers", TWICE)
    stored(ledger, "hashes", HASH)
    assert set_names(ledger) == ["hashes", "numbers"]
    assert all(one.complete for one in score_sets(ledger))
    select(ledger, ledger.parts(), "some", Query(f"twice >= 10 and phash < {2**63 + 8}"))
    assert selected_keys(ledger, ledger.parts(), "some") == set(keys(ledger)[5:8])
    assert columns_of(ledger).names[-2:] == ["twice", "phash"]
    found = verify(ledger)
    assert found.ok, found.problems
