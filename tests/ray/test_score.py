"""`batchgen score` over a finished output: after kill -9 it goes on, and scores nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from batchgen.curate.columns import columns_of
from batchgen.curate.score_sets import score_sets, shards_of
from batchgen.output.lease import holders_of
from batchgen.output.ledger import Ledger
from batchgen.output.score_set import files_of, lease_folder, ledger_of, scores_of
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_prompts
from tests.own_scorers import LOG

ROOT = Path(__file__).parents[2]
SHARDS, EACH = 10, 2


@pytest.fixture
def output(tmp_path: Path) -> Ledger:
    source = write_prompts(tmp_path / "in.parquet", SHARDS * EACH)
    plan = plan_for(source, tmp_path / "out", output__samples_per_shard=EACH)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    return ledger


def command(ledger: Ledger, *words: str, log: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if log is not None:
        environment[LOG] = str(log)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "batchgen",
            "score",
            ledger.store.url,
            "--max-replicas",
            "1",
            *words,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_scoring_goes_on_and_scores_nothing_twice(output: Ledger, tmp_path: Path) -> None:
    before = {name: output.store.read(f"data/{name}") for name in output.store.find("data")}
    log = tmp_path / "scored"
    words = ("--scorer", "tests.own_scorers:counted", "--name", "red")
    first = command(output, *words, log=log)
    while len(files_of(output, "red").marked) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    kept = files_of(output, "red").marked
    assert 3 <= len(kept) < SHARDS
    committed = {key for key in log.read_text().split() if int(key[-11:-3]) // EACH in kept}
    told = {shard: ledger_of(output, "red").marker(shard) for shard in kept}

    second = command(output, "--name", "red", log=log)  # the scorers are those of the set
    said, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    assert f"{SHARDS * EACH} images scored" in said and "columns redness, row" in said
    calls = Counter(log.read_text().split())
    assert len(calls) == SHARDS * EACH
    assert all(calls[key] == 1 for key in committed)
    # The shards under way when the first run was killed may have been scored without a marker.
    assert sum(count - 1 for count in calls.values()) <= 2 * EACH
    own = ledger_of(output, "red")
    assert {shard: own.marker(shard) for shard in kept} == told
    rows = [row for one in own.markers(range(SHARDS)) for row in scores_of(output, one).to_pylist()]
    assert [row["row"] for row in rows] == list(range(SHARDS * EACH))
    (scored,) = score_sets(output)
    assert scored.complete
    found = columns_of(output).query("select count(*) as n from samples where redness > 0")
    assert found.to_pylist() == [{"n": SHARDS * EACH}]
    assert before == {name: output.store.read(f"data/{name}") for name in output.store.find("data")}
    assert [one.released for one in holders_of(output.store, lease_folder("red"))] == [False, True]
    checked = verify(output)
    assert checked.ok, checked.problems


def test_what_cannot_be_scored_is_counted_and_has_no_scores(output: Ledger) -> None:
    run = command(output, "--scorer", "tests.own_scorers:fails_on_row_5", "--name", "area")
    said, errors = run.communicate(timeout=240)
    assert run.returncode == 2, errors
    assert "19 images scored" in said and "1 could not be scored" in said
    assert "row 5 cannot be scored" in said
    own = ledger_of(output, "area")
    rows = [row for one in own.markers(range(SHARDS)) for row in scores_of(output, one).to_pylist()]
    assert [row["area"] is None for row in rows] == [number == 5 for number in range(SHARDS * EACH)]


def test_two_runs_score_one_set_side_by_side(output: Ledger, tmp_path: Path) -> None:
    words = ("--scorer", "tests.own_scorers:counted", "--name", "red")
    runs = [
        command(output, *words, "--shards", shards, log=tmp_path / "scored")
        for shards in ("0:5", "5:10")
    ]
    for run in runs:
        said, errors = run.communicate(timeout=300)
        assert run.returncode == 0, (said, errors)
    calls = Counter((tmp_path / "scored").read_text().split())
    assert set(calls.values()) == {1} and len(calls) == SHARDS * EACH
    assert len(list(shards_of(output))) == SHARDS and score_sets(output)[0].complete
