"""At the output's location, a batchgen output is continued and other files are left unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchgen import runner
from batchgen.errors import DamagedRecord, InputError, PlanChanged
from batchgen.output.claim import claim, plan_to_keep
from batchgen.output.formats import FORMATS
from batchgen.output.holdings import (
    anything_made,
    card_is_ours,
    holdings_of,
    refuse_to_remove,
    refuse_unless_free,
    remove_output,
)
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker
from batchgen.output.verify import verify
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.storage import Store, open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import paper_plan, plan_for, write_prompts
from tests.outputs import spec_for

OLD = Path(__file__).parents[1] / "old_outputs" / "v0.1"


@pytest.fixture(params=["disk", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store: a local folder, and a bucket in memory."""
    if request.param == "disk":
        return open_store(str(tmp_path / "out"))
    return open_store(f"memory://bucket{abs(hash(str(tmp_path)))}/out")


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return Ledger(store)


def made(folder: Path, rows: int = 6, **settings: object) -> Ledger:
    """A finished output in ``folder``, of shards of three rows."""
    path = write_prompts(folder.parent / "in" / "a.parquet", rows)
    plan = plan_for(path, folder, output__samples_per_shard=3, **settings)
    ledger = Ledger(open_store(str(folder)))
    make_output(plan, ledger)
    finalize(plan, ledger, Tally(plan.shards, plan.samples))
    return ledger


@pytest.mark.parametrize(
    "names",
    [
        ["README.md"],
        ["notes.txt"],
        ["data/mine.txt"],
        ["data/deep/mine.txt"],
        [".git/HEAD"],
        ["src/a.py", "src/b.py", "README.md", "c", "d", "e", "f"],
    ],
)
def test_what_is_not_batchgens_is_no_output(ledger: Ledger, names: list[str]) -> None:
    for name in names:
        ledger.store.put(name, b"# My precious project\n")
    with pytest.raises(InputError, match="is not empty and is not a batchgen output") as said:
        refuse_unless_free(ledger)
    shown = str(said.value).partition("it contains ")[2]
    tops = {name if name.startswith("data/m") else name.partition("/")[0] for name in names}
    assert any(top.partition("/")[0] in shown for top in tops)
    assert ("and 2 more" in shown) == (len(names) > 2)


@pytest.mark.parametrize(
    "names", [[], [".DS_Store"], ["data/.DS_Store", "Thumbs.db"], ["_batchgen/lease/00001.json"]]
)
def test_what_no_person_put_there_does_not_count(ledger: Ledger, names: list[str]) -> None:
    for name in names:
        ledger.store.put(name, b"")
    refuse_unless_free(ledger)


def test_empty_folders_of_ours_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "_batchgen" / "shards").mkdir(parents=True)
    refuse_unless_free(Ledger(open_store(str(tmp_path))))


def test_results_without_their_plan_are_not_adopted(tmp_path: Path) -> None:
    ledger = made(tmp_path / "out")
    plan = (tmp_path / "out/_batchgen/plan.json").rename(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"holds 2 committed shards, but no .*plan\.json") as said:
        runner.run(spec_for(tmp_path / "in/a.parquet", tmp_path / "out", seed=99))
    assert "restore that file" in str(said.value) and "--overwrite" in str(said.value)
    plan.rename(tmp_path / "out/_batchgen/plan.json")
    refuse_unless_free(ledger)


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_of_every_version_is_ours(form: str, tmp_path: Path) -> None:
    assert card_is_ours(open_store(str(OLD / form)))
    made(tmp_path / "out", output__format=form)
    assert card_is_ours(open_store(str(tmp_path / "out")))


def test_a_card_that_somebody_wrote_is_never_replaced(tmp_path: Path) -> None:
    ledger = made(tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Synthetic images of mine\n")
    plan = ledger.require_plan()
    outcome = finalize(plan, ledger, Tally(plan.shards, plan.samples))
    assert card.read_text().endswith("images of mine\n")
    assert "README.md is not batchgen's and was kept" in outcome.message
    assert "accepted" in (tmp_path / "out/_batchgen/README.md").read_text()


def say_nothing(text: str) -> None:
    pass


def test_a_plan_by_which_nothing_was_made_is_replaced(ledger: Ledger) -> None:
    wrong, right = paper_plan([[5]], seed=1), paper_plan([[5]], seed=2)
    assert claim(ledger, wrong, wrong.spec, say_nothing, whole=True) == (wrong,)
    ledger.fail(FailedMarker(0, 5, "ModelError", "a LoRA of another base"))
    assert plan_to_keep(ledger) is None
    told: list[str] = []
    assert claim(ledger, right, right.spec, told.append, whole=True) == (right,)
    assert told[0].startswith(
        "the plan is replaced, since nothing was generated with it (seed has chan"
    )
    assert ledger.require_plan().fingerprint == right.fingerprint
    assert (ledger.job().seed, ledger.failures([0])) == (2, [])


@pytest.mark.parametrize(
    "name",
    [
        *("_batchgen/shards/00000.json", "data/x.parquet", "_batchgen/rejects/00000.parquet"),
        "_batchgen/parts/0001.json",
    ],
)
def test_a_plan_by_which_something_was_made_binds(ledger: Ledger, name: str) -> None:
    wrong, right = paper_plan([[5]], seed=1), paper_plan([[5]], seed=2)
    claim(ledger, wrong, wrong.spec, say_nothing, whole=True)
    ledger.store.put(name, b"something")
    assert anything_made(ledger) and plan_to_keep(ledger) is not None
    with pytest.raises(
        PlanChanged, match=r"seed has changed.*or start over in this one with .*--ov"
    ):
        claim(ledger, right, right.spec, say_nothing, whole=True)
    assert ledger.require_plan().fingerprint == wrong.fingerprint


def test_a_run_of_a_part_replaces_no_plan(ledger: Ledger) -> None:
    wrong, right = paper_plan([[5]], seed=1), paper_plan([[5]], seed=2)
    claim(ledger, wrong, wrong.spec, say_nothing, whole=True)
    with pytest.raises(PlanChanged):
        claim(ledger, right, right.spec, say_nothing, whole=False)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 50_000, b"{}"])
def test_a_damaged_plan_is_replaced_or_named(ledger: Ledger, data: bytes) -> None:
    plan = paper_plan([[5]])
    ledger.store.put("_batchgen/plan.json", data)
    assert plan_to_keep(ledger) is None
    assert claim(ledger, plan, plan.spec, say_nothing, whole=True) == (plan,)
    ledger.store.put("_batchgen/plan.json", data)
    ledger.store.put("_batchgen/shards/00000.json", b"{}")
    with pytest.raises(DamagedRecord, match=r"plan\.json is damaged"):
        plan_to_keep(ledger)


def test_the_last_runs_policy_is_in_force(ledger: Ledger) -> None:
    first, again = (paper_plan([[5]], policy__rejected_limit=limit) for limit in (0.1, 0.5))
    claim(ledger, first, first.spec, say_nothing, whole=True)
    claim(ledger, again, again.spec, say_nothing, whole=True)
    plan = ledger.require_plan()
    assert plan.spec.policy.rejected_limit == 0.1
    assert ledger.in_force(plan).spec.policy.rejected_limit == 0.5
    assert ledger.job().policy.rejected_limit == 0.5


@pytest.mark.parametrize("form", FORMATS)
def test_overwriting_removes_what_batchgen_made_and_no_more(form: str, tmp_path: Path) -> None:
    ledger = made(tmp_path / "out", output__format=form)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "data" / ".DS_Store").write_text("the system's")
    assert set(holdings_of(ledger).own) >= {"README.md", "_batchgen/plan.json"}
    assert list(holdings_of(ledger).own)[:2] == [
        "_batchgen/shards/00000.json",
        "_batchgen/shards/00001.json",
    ]
    assert list(holdings_of(ledger).own)[-1] == "_batchgen/plan.json"
    remove_output(ledger)
    left = {str(one.relative_to(tmp_path / "out")) for one in (tmp_path / "out").rglob("*")}
    assert left <= {"notes.txt", "data", "data/.DS_Store", "_batchgen", "_batchgen/tmp"}
    (tmp_path / "out" / "notes.txt").unlink()
    assert verify(made(tmp_path / "out", rows=9, output__format=form)).problems == []


def test_overwriting_refuses_what_would_be_in_its_way_or_is_needed(tmp_path: Path) -> None:
    ledger = made(tmp_path / "out")
    inside = spec_for(tmp_path / "out" / "data", tmp_path / "out")
    with pytest.raises(InputError, match=r"is in output .* which `--overwrite` removes"):
        refuse_to_remove(ledger, inside)
    (tmp_path / "out/data/mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"batchgen did not write data/mine\.txt; move it"):
        refuse_to_remove(ledger, spec_for(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(InputError, match=r"data/mine\.txt"):
        remove_output(ledger)
    assert ledger.states(ledger.require_plan()).pending == []


def test_overwriting_takes_no_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "proj").mkdir()
    (tmp_path / "proj/README.md").write_text("# mine")
    ledger = Ledger(open_store(str(tmp_path / "proj")))
    with pytest.raises(InputError, match="is not a batchgen output"):
        refuse_to_remove(ledger, spec_for(tmp_path / "in", tmp_path / "proj"))
    assert holdings_of(ledger).own == {}


def test_a_moved_output_names_the_place_where_it_is(tmp_path: Path) -> None:
    made(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    ledger = Ledger(open_store(str(tmp_path / "moved")))
    plan = ledger.require_plan()
    assert plan.spec.output.url == str(tmp_path / "moved")
    outcome = finalize(plan, ledger, Tally(plan.shards, plan.samples))
    assert str(tmp_path / "moved") in outcome.message
    assert str(tmp_path / "out") not in outcome.message
    assert plan.fingerprint == replace(plan, frozen=None).fingerprint
