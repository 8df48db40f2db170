"""Selections: a query decides which samples to use, and nothing is generated or changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.cli import main
from batchgen.curate.selection import (
    Query,
    names_in,
    select,
    selected_keys,
    stored_selections,
)
from batchgen.errors import InputError, PlanChanged, SpecError
from batchgen.output.export import export
from batchgen.output.find import find_sample
from batchgen.output.ledger import Ledger
from batchgen.output.rejects import by_reason
from batchgen.output.restrict import Chosen
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_prompts

FORMATS = ("parquet", "webdataset", "image-folder")
COUNT = 12


def output_of(folder: Path, form: str = "parquet") -> Ledger:
    """Twelve samples in three shards, with a number and a class each."""
    table = pa.table(
        {
            "prompt": [f"p{number}" for number in range(COUNT)],
            "number": pa.array(range(COUNT), pa.int64()),
            "kind": ["cat", "dog", None] * 4,
        }
    )
    pq.write_table(table, folder / "in.parquet")
    dotted = {
        "output__format": form,
        "output__samples_per_shard": 4,
        "input__columns__label": "kind",
        "resources__batch_size": 2,
    }
    return made(plan_for(folder / "in.parquet", folder / "out", **dotted))


def made(plan: Plan) -> Ledger:
    """A finished output."""
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    return ledger


@pytest.fixture(scope="module", params=FORMATS)
def ledger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return output_of(tmp_path_factory.mktemp("selection"), request.param)


def contents(ledger: Ledger) -> dict[str, bytes]:
    return {name: ledger.store.read(f"data/{name}") for name in ledger.store.find("data")}


def numbers(ledger: Ledger, name: str) -> set[int]:
    """The row numbers of the selected keys, which end in it."""
    keys = selected_keys(ledger, ledger.require_plan(), name)
    return {int(key.removesuffix("-v0").rpartition("-")[2]) for key in keys}


def test_a_condition_selects_in_every_format_and_changes_nothing(ledger: Ledger) -> None:
    before = contents(ledger)
    found = select(ledger, ledger.require_plan(), "high", Query("number >= 7"))
    assert (found.samples, found.selected, found.reasons) == (COUNT, 5, {"where": 7})
    assert numbers(ledger, "high") == set(range(7, COUNT))
    assert before == contents(ledger)
    found = verify(ledger)
    assert found.ok, found.problems


def test_the_best_of_each_group(ledger: Ledger) -> None:
    query = Query("number <> 9", top=2, by="number", per=("label",))
    found = select(ledger, ledger.require_plan(), "best", query)
    assert numbers(ledger, "best") == {6, 3, 10, 7, 11, 8}
    assert found.groups == {"cat": (4, 2), "dog": (4, 2), "null": (4, 2)}
    assert found.reasons == {"where": 1, "rank": 5}
    select(ledger, ledger.require_plan(), "worst", Query(top=1, by="number", lowest=True))
    assert numbers(ledger, "worst") == {0}
    assert {"best", "worst"} <= set(names_in(ledger))


def test_a_null_does_not_meet_a_condition(ledger: Ledger) -> None:
    found = select(ledger, ledger.require_plan(), "cats", Query("label = 'cat'"))
    assert (found.selected, found.reasons) == (4, {"where": 8})


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query("numbre > 3"), "numbre"),
        (Query("number >"), "cannot be evaluated"),
        (Query("number > 'x'"), "cannot be evaluated"),
        (Query("number > 100"), "keeps none of 12 samples"),
        (Query("true) union select * from read_csv('/etc/passwd') --"), "cannot be evaluated"),
        (Query("exists (select 1 from read_text('/etc/passwd'))"), "cannot be evaluated"),
    ],
)
def test_a_wrong_condition_is_named_and_stores_nothing(
    ledger: Ledger, query: Query, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        select(ledger, ledger.require_plan(), "wrong", query)
    assert "wrong" not in names_in(ledger)


@pytest.mark.parametrize(
    ("name", "query", "words"),
    [
        ("../x", Query("true"), "--name"),
        ("", Query("true"), "--name"),
        ("a", Query(), "--where"),
        ("a", Query(top=0, by="number"), "--top"),
        ("a", Query(top=3), "--top"),
        ("a", Query("true", by="number"), "--by"),
        ("a", Query(top=3, by="number", per=("labels",)), "did you mean 'label'"),
    ],
)
def test_what_does_not_fit_together_is_named(
    ledger: Ledger, name: str, query: Query, words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        select(ledger, ledger.require_plan(), name, query)


def test_a_selection_that_is_not_there_is_named(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    plan = ledger.require_plan()
    with pytest.raises(InputError, match="has no selection 'bright'; it has none"):
        selected_keys(ledger, plan, "bright")
    select(ledger, plan, "bright", Query("number > 3"))
    with pytest.raises(InputError, match="did you mean 'bright'"):
        selected_keys(ledger, plan, "brigth")
    place = tmp_path / "out/_batchgen/selections/bright.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "plan_fingerprint": "0"}))
    with pytest.raises(InputError, match="made of another plan"):
        selected_keys(ledger, plan, "bright")


def test_nothing_committed_is_told(tmp_path: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "in.parquet", 2), tmp_path / "out")
    ledger = Ledger(open_store(plan.spec.output.url))
    ledger.freeze(plan, plan.spec)
    with pytest.raises(InputError, match="no committed shard"):
        select(ledger, plan, "all", Query("true"))


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=COUNT, max_size=COUNT),
    low=st.integers(-20, 20).map(lambda number: number / 4),  # DuckDB compares in 32 bits
    top=st.integers(1, COUNT),
)
def test_bands_and_ranks_are_those_of_plain_python(
    values: list[float | None], low: float, top: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bands")
    table = pa.table(
        {
            "prompt": [f"p{number}" for number in range(COUNT)],
            "score": pa.array(values, pa.float32()),
        }
    )
    pq.write_table(table, folder / "in.parquet")
    ledger = made(plan_for(folder / "in.parquet", folder / "out"))
    plan = ledger.require_plan()
    kept = pq.read_table(folder / "out/data").column("score").to_pylist()
    fits = [one is not None and low <= one <= low + 3 for one in kept]
    query = Query(f"score between {low} and {low + 3}", top=top, by="score")
    if not any(fits):
        with pytest.raises(InputError, match="keeps none"):
            select(ledger, plan, "band", query)
        return
    found = select(ledger, plan, "band", query)
    assert found.selected == min(top, sum(fits))


def test_the_command_tells_what_it_has_selected(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    words = ["select", ledger.store.url, "--name", "some", "--where", "number > 5"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0 and "some: 6 of 12 samples selected" in found.output
    found = CliRunner().invoke(main, [*words, "--json"])
    facts: dict[str, Any] = json.loads(found.stdout)
    assert facts["query"]["where"] == "number > 5" and facts["selected"] == 6
    found = CliRunner().invoke(main, ["select", ledger.store.url, "--name", "x"])
    assert found.exit_code == 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_copy_has_the_selected_samples_and_lists_the_others(form: str, tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    plan = ledger.require_plan()
    select(ledger, plan, "some", Query("number >= 7"))
    chosen = Chosen("some", selected_keys(ledger, plan, "some"))
    target = open_store(str(tmp_path / "copy"))
    assert export(ledger, target, form, chosen) == 3
    copy = Ledger(target)
    found = verify(copy)
    assert found.ok, found.problems
    assert (found.planned, found.accepted, found.rejected) == (COUNT, 5, 7)
    (group,) = by_reason(copy)
    assert (group.reason, group.count) == ("not-selected", 7)
    assert export(ledger, target, form, chosen) == 0
    with pytest.raises(PlanChanged, match="copy of other samples"):
        export(ledger, target, form)
    fewer = Chosen("fewer", frozenset(list(chosen.keys)[:2]))
    with pytest.raises(PlanChanged, match="copy of other samples"):
        export(ledger, target, form, fewer)
    labels = {name for marker in copy.markers(range(3)) for name in marker.labels}
    assert labels <= {"cat", "dog"}
    counted = sum(sum(marker.labels.values()) for marker in copy.markers(range(3)))
    assert counted == sum(number % 3 != 2 for number in range(7, COUNT))


def test_the_command_exports_a_selection(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    select(ledger, ledger.require_plan(), "some", Query("number >= 7"))
    words = ["export", ledger.store.url, str(tmp_path / "copy"), "--format", "webdataset"]
    found = CliRunner().invoke(main, [*words, "--selection", "smoe"])
    assert found.exit_code == 1 and "did you mean 'some'" in found.output
    found = CliRunner().invoke(main, [*words, "--selection", "some"])
    assert found.exit_code == 0, found.output
    assert "5 images" in found.output


def test_columns_and_values_that_could_confuse_a_query_do_not(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "fits": [False, True, False],
            "place": [3, 2, 1],
            "score": [1.0, float("nan"), 3.0],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    ledger = made(plan_for(tmp_path / "in.parquet", tmp_path / "out"))
    plan = ledger.require_plan()
    select(ledger, plan, "low", Query("score < 2 -- low ones"))
    assert numbers(ledger, "low") == {0}
    select(ledger, plan, "best", Query(top=1, by="score"))
    assert numbers(ledger, "best") == {2}
    select(ledger, plan, "text", Query(top=1, by="prompt -- text ranks as well"))
    assert numbers(ledger, "text") == {2}


def test_a_damaged_selection_or_output_is_named(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    plan = ledger.require_plan()
    select(ledger, plan, "some", Query("number > 3"))
    table = tmp_path / "out/_batchgen/selections/some.parquet"
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(InputError, match="'some' is damaged or incomplete"):
        selected_keys(ledger, plan, "some")
    data = sorted((tmp_path / "out/data").iterdir())[1]
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InputError, match="see `batchgen verify"):
        select(ledger, plan, "other", Query("number > 3"))
    with pytest.raises(InputError, match="is missing or damaged; see `batchgen verify"):
        find_sample(ledger, plan, "in-00000005-v0")
    assert find_sample(ledger, plan, "in-00000001-v0").row["number"] == 1
    data.unlink()
    with pytest.raises(InputError, match="is missing or damaged; see `batchgen verify"):
        find_sample(ledger, plan, "in-00000005-v0")


def command(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_several_selections_are_listed_made_again_and_removed(tmp_path: Path) -> None:
    url = output_of(tmp_path).store.url
    assert "no selection yet" in command("select", url)
    command("select", url, "--name", "high", "--where", "number >= 7")
    command("select", url, "--name", "best", "--top", "1", "--by", "number", "--per", "label")
    listed = command("select", url)
    assert "high: 5 of 12 samples, where number >= 7" in listed
    assert "best: 3 of 12 samples, the 1 highest by number of each label" in listed
    assert "5 of 12" in command("select", url, "--name", "high", "--again")
    found = json.loads(command("select", url, "--json"))
    assert [(one["name"], one["stale"]) for one in found] == [("best", ""), ("high", "")]
    assert "removed: selection best" in command("select", url, "--name", "best", "--remove")
    assert names_in(Ledger(open_store(url))) == ["high"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--where", "number > 1"], "--name"),
        (["--remove"], "--name"),
        (["--name", "some", "--remove"], "has no selection 'some'; it has none"),
        (["--name", "some", "--again", "--where", "number > 1"], "the stored query counts"),
        (["--name", "some", "--where", "label = 'catt'"], "the labels are cat, dog"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["select", output_of(tmp_path).store.url, *words])
    assert result.exit_code == 1 and said in result.output


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("number between 3 and 8", {3, 4, 5, 6, 7, 8}),
        ("case label when 'cat' then number > 5 when 'dog' then number < 5 end", {6, 9, 1, 4}),
        ("number > avg(number) over (partition by label)", {6, 9, 7, 10, 8, 11}),
        (
            "row_number() over (partition by label order by number) between 2 and 3",
            {3, 6, 4, 7, 5, 8},
        ),
    ],
)
def test_bands_thresholds_of_classes_and_ranks(tmp_path: Path, where: str, kept: set[int]) -> None:
    ledger = output_of(tmp_path)
    select(ledger, ledger.parts(), "some", Query(where))
    assert numbers(ledger, "some") == kept


def test_a_selection_says_that_it_is_stale(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    select(ledger, ledger.parts(), "some", Query("number > 3"))
    assert [one.stale for one in stored_selections(ledger)] == [""]
    marker = ledger.marker(2)
    assert marker is not None
    ledger.withdraw(2)
    assert stored_selections(ledger)[0].stale == "the output had 3 shards, now it has 2"
    with pytest.raises(InputError, match=r"stale: the output had 3 shards.*--again"):
        selected_keys(ledger, ledger.parts(), "some")
    digest = marker.files[0].sha256
    ledger.store.put(
        "_batchgen/shards/00002.json", marker.to_json().replace(digest.encode(), b"0" * 64)
    )
    assert "generated again" in stored_selections(ledger)[0].stale
    ledger.store.put("_batchgen/shards/00002.json", marker.to_json())
    assert stored_selections(ledger)[0].stale == ""
