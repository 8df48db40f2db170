"""Complete runs on real Ray beyond those of tests/ray: parts, smaller calls, several replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batchgen import runner
from batchgen.errors import OutputBusy, PlanChanged, SpecError
from batchgen.output.lease import acquire_lease
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.conftest import LOGICAL_CPUS
from tests.outputs import digests_of, spec_for
from tests.ray.test_run import ledger, make, make_here

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.long]
Prompts = Callable[..., Path]


def test_bytes_do_not_depend_on_the_number_of_replicas(prompts: Prompts, tmp_path: Path) -> None:
    source = prompts(12)
    make_here(source, tmp_path / "one")
    two = {"min_replicas": 2, "num_cpus": LOGICAL_CPUS / 2}  # with every CPU of the machine
    assert make(source, tmp_path / "two", resources__generate=two).exit_code == 0
    assert digests_of(tmp_path / "two") == digests_of(tmp_path / "one")


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
