"""Complete runs on real Ray beyond those of tests/ray: parts, smaller calls, several replicas."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen import runner
from batchgen.errors import OutputBusy, PlanChanged, SpecError
from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Outcome
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.conftest import LOGICAL_CPUS
from tests.outputs import digests_of, spec_for
from tests.ray.test_run import ledger, make, make_here

pytestmark = pytest.mark.usefixtures("ray_session")
long = pytest.mark.long
Prompts = Callable[..., Path]


@long
def test_bytes_do_not_depend_on_the_number_of_replicas(prompts: Prompts, tmp_path: Path) -> None:
    source = prompts(12)
    make_here(source, tmp_path / "one")
    two = {"min_replicas": 2, "num_cpus": LOGICAL_CPUS / 2}  # with every CPU of the machine
    assert make(source, tmp_path / "two", resources__generate=two).exit_code == 0
    assert digests_of(tmp_path / "two") == digests_of(tmp_path / "one")


@long
def test_a_resume_with_smaller_calls(prompts: Prompts, tmp_path: Path) -> None:
    source, output = prompts(12), tmp_path / "out"
    make_here(source, output)
    whole, plan = digests_of(output), (output / "_batchgen" / "plan.json").read_bytes()
    for shard in (1, 2):
        ledger(output).withdraw(shard)
    with pytest.raises(SpecError, match="a resume cannot raise it"):
        runner.resume(str(output), quiet=True, batch_size=3)
    outcome = runner.resume(str(output), quiet=True, shards="1:2", batch_size=1)
    assert outcome.pending == 0
    outcome = runner.resume(str(output), quiet=True)
    assert outcome.exit_code == 0 and verify(ledger(output)).ok
    markers = list(ledger(output).markers(range(3)))
    assert [(one.batch_size, one.decode_batch_size) for one in markers] == [(2, 2), (1, 1), (1, 1)]
    assert ledger(output).job().resources.batch_size == 1
    assert (output / "_batchgen" / "plan.json").read_bytes() == plan
    assert digests_of(output).keys() == whole.keys()
    with pytest.raises(PlanChanged, match="`batchgen resume --batch-size N` lowers it"):
        make(source, output, resources__batch_size=1)


@long
def test_a_part_leaves_the_rest_pending(prompts: Callable[..., Path], tmp_path: Path) -> None:
    spec = spec_for(prompts(11), tmp_path / "out")
    outcome = runner.run(spec, quiet=True, shards="2:")
    assert (outcome.exit_code, outcome.accepted) == (0, 3)
    assert outcome.message.endswith("in all 1 of 3 committed")
    store = open_store(str(tmp_path / "out"))
    assert Ledger(store).states(runner.plan_job(spec)).pending == [0, 1]
    assert not (tmp_path / "out" / "README.md").exists()
    lease = acquire_lease(store, (0, 2))
    with pytest.raises(OutputBusy, match="shards 0:2"):
        runner.resume(str(tmp_path / "out"), quiet=True)
    lease.release()
    assert runner.resume(str(tmp_path / "out"), quiet=True).exit_code == 0
    assert verify(Ledger(store)).ok


@long
def test_resume_from_elsewhere_goes_on_where_the_output_is(
    prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(8)
    monkeypatch.chdir(tmp_path)
    spec = spec_for(Path("prompts.parquet").absolute(), Path("out"))
    ledger(tmp_path / "out").freeze(runner.plan_job(spec), spec)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = runner.resume("../moved", quiet=True)
    assert (outcome.exit_code, outcome.accepted) == (0, 8)
    assert verify(ledger(tmp_path / "moved")).ok
    assert not (tmp_path / "out").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_two_runs_at_once_make_what_one_makes(prompts: Callable[..., Path], tmp_path: Path) -> None:
    source = prompts(11)
    make_here(source, tmp_path / "one")
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
    found = ledger(tmp_path / "two")
    findings = verify(found)
    assert findings.ok and findings.accepted == 11
    assert [marker.attempt for marker in found.markers(range(3))] == [1, 1, 1]
    assert (tmp_path / "two" / "_batchgen" / "report.html").exists()  # of the one that ended last
    said = sorted(outcome.message.partition(";")[2] for outcome in outcomes.values())
    assert any("no other shard is pending" in text for text in said), said
