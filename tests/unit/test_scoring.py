"""What `batchgen score` refuses before it starts, and how a shard is scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

from batchgen import scoring
from batchgen.cli import main
from batchgen.curate.score_request import Request, fingerprint_of, pool_of, settled
from batchgen.errors import InputError, ModelError, OutOfMemory, PlanChanged, RetryShard, SpecError
from batchgen.output.ledger import Ledger
from batchgen.output.score_set import claim_set, commit_scores, keep_set, ledger_of, scores_of
from batchgen.shard.rescore import AT_ONCE, groups, rescore
from batchgen.shard.work import Trial
from batchgen.spec.score_section import ScorerSpec, Settled, read_scorer
from batchgen.stages.scorers.phash import PerceptualHash
from batchgen.stages.scorers.scorer import ScoreColumn, Scored, scores
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, png, prompts, write_columns, write_prompts
from tests.own_scorers import counted, fails_on_row_5
from tests.unit.test_score_sets import TWICE, stored
from tests.unit.test_selection import FORMATS, output_of

PHASH = (read_scorer("phash"),)
RED = (read_scorer("tests.own_scorers:counted"),)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    yield output_of(tmp_path_factory.mktemp("scoring"))


def asked(ledger: Ledger, *specs: Any, **more: Any) -> Any:
    return settled(ledger, Request(tuple(specs), **more), ledger.parts())


def test_a_set_is_named_by_its_scorers_and_continued_without_them(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    record, _ = asked(ledger, *PHASH, *RED)
    assert record.name == "phash-tests-own_scorers-counted"
    assert [one.name for one in record.columns] == ["phash", "redness", "row"]
    claim_set(ledger, record)
    again, specs = asked(ledger)
    assert (again.name, again.fingerprint) == (record.name, record.fingerprint)
    assert [one.title for one in specs] == ["phash", "tests.own_scorers:counted"]
    claim_set(ledger, asked(ledger, *PHASH, name="other")[0])
    with pytest.raises(SpecError, match="--name with one of other, phash-tests"):
        asked(ledger)


def test_other_scorers_and_other_outputs_are_refused_by_name(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    record, _ = asked(ledger, *PHASH, name="some")
    claim_set(ledger, record)
    with pytest.raises(PlanChanged, match=r"'some' .*made by phash, now asked for: tests\.own"):
        asked(ledger, *RED, name="some")
    keep_set(ledger, scoring.replace(record, plans=("another",)))
    with pytest.raises(PlanChanged, match="scores of another plan"):
        asked(ledger, *PHASH, name="some")
    stored(ledger, "whole", TWICE)
    with pytest.raises(InputError, match="stored by another command"):
        asked(ledger, *PHASH, name="whole")


def test_a_set_grows_with_an_extended_output(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    record, _ = asked(ledger, *PHASH, name="some")
    claim_set(ledger, record)
    longer = scoring.replace(record, plans=(*record.plans, "a second part"))
    assert claim_set(ledger, longer).plans == longer.plans


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--scorer"),
        (["--scorer", "phahs"], "did you mean 'phash'"),
        (["--scorer", "phash", "--name", "a/b"], "--name"),
        (["--scorer", "phash", "--shards", "2:9"], "--shards"),
        (["--scorer", "phash", "--num-gpus", "-1"], "--num-gpus"),
        (["--scorer", "phash", "--max-replicas", "0"], "--max-replicas"),
        (["--scorer", "phash", "--scorer", "phash"], "two scorers fill the column phash"),
        (["--name", "none"], "has no score set 'none'; it has none"),
        (["--scorer", "no_such_module:f"], "cannot be imported"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_work(
    ledger: Ledger, words: list[str], said: str
) -> None:
    result = CliRunner().invoke(main, ["score", ledger.store.url, *words])
    assert result.exit_code == 1 and said in result.output, result.output
    assert not ledger.store.find("_batchgen/scores")


def test_an_output_without_images_has_nothing_to_score(tmp_path: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "in.parquet", 2), tmp_path / "out")
    ledger = Ledger(open_store(plan.spec.output.url))
    ledger.freeze(plan, plan.spec)
    with pytest.raises(InputError, match="no committed shard yet, so nothing to score"):
        asked(ledger, *PHASH)


def test_scorers_without_a_model_reserve_no_gpu(ledger: Ledger) -> None:
    plan = ledger.parts()[0]
    made = scoring._plan(plan, PHASH, pool_of(None, 0.5, 3), {})
    pool = made.spec.resources.generate
    assert (pool.num_gpus, pool.num_cpus, pool.max_replicas) == (0, 0.5, 3)
    with_model = [PHASH[0].model_copy(update={"model": "somewhere"})]
    made = scoring._plan(plan, with_model, pool_of(None, None, None), {})
    assert made.spec.resources.generate.num_gpus is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_is_scored_in_every_format(tmp_path: Path, form: str) -> None:
    ledger = output_of(tmp_path, form)
    plan, marker = ledger.parts()[0], ledger.marker(1)
    assert marker is not None
    found = rescore([counted, PerceptualHash()], ledger, plan, marker, Trial())
    assert found.table.column_names == ["key", "redness", "row", "phash"]
    assert found.table.column("row").to_pylist() == [4, 5, 6, 7]
    assert not found.failed and found.timings_s.keys() == {"read", "score"}
    record, _ = asked(ledger, *RED, name="red")
    commit_scores(ledger, record, marker, found.table)
    own = next(iter(ledger_of(ledger, "red").markers([1])))
    assert scores_of(ledger, own).equals(found.table)


def test_suspects_are_scored_alone_and_culprits_left_out(ledger: Ledger) -> None:
    keys = [str(number) for number in range(AT_ONCE + 3)]
    trial = Trial(alone={"1", "4"}, without={"4": "it crashed", "5": "it crashed"})
    found = list(groups(keys, trial))
    assert [len(places) for places in found] == [AT_ONCE, 1]
    scored = sorted(place for places in found for place in places)
    assert scored == [place for place in range(len(keys)) if place not in (4, 5)]

    plan, marker = ledger.parts()[0], ledger.marker(1)
    assert marker is not None
    with pytest.raises(ValueError, match="row 5"):
        rescore([fails_on_row_5], ledger, plan, marker, Trial())
    rows = rescore([counted], ledger, plan, marker, Trial()).table.column("key").to_pylist()
    tried = rescore([fails_on_row_5], ledger, plan, marker, Trial(without={rows[1]: "row 5"}))
    assert [one is None for one in tried.table.column("area").to_pylist()] == [0, 1, 0, 0]
    assert tried.failed == {rows[1]: "row 5"}


@scores(ScoreColumn("red", pa.int32(), "of the source"), reads=("key",), compares=True)
def red_of_source(images: Scored) -> dict[str, Any]:
    return {"red": [None if one is None else int(one[0, 0, 0]) for one in images.sources]}


def test_a_scorer_that_compares_gets_the_conditioning_image(tmp_path: Path) -> None:
    pictures = [png(64, 64, (20 * number, 0, 0)) for number in range(6)]
    path = write_columns(tmp_path / "in.parquet", {"prompt": prompts(6), "image": pictures})
    dotted = {"task": "image-to-image", "input__columns__image": "image"}
    plan = plan_for(path, tmp_path / "out", output__samples_per_shard=3, **dotted)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    marker = ledger.marker(1)
    assert marker is not None
    found = rescore([red_of_source], ledger, ledger.parts()[0], marker, Trial()).table
    assert found.column("red").to_pylist() == [60, 80, 100]
    (tmp_path / "in.parquet").unlink()
    with pytest.raises(RetryShard):
        rescore([red_of_source], ledger, ledger.parts()[0], marker, Trial())


@scores(ScoreColumn("x", pa.int32(), "nothing"))
def forgets(images: Scored) -> dict[str, Any]:
    return {}


@scores(ScoreColumn("x", pa.int32(), "too few"))
def too_few(images: Scored) -> dict[str, Any]:
    return {"x": [1]}


@scores(ScoreColumn("x", pa.int32(), "text"))
def wrong_type(images: Scored) -> dict[str, Any]:
    return {"x": ["a"] * len(images.pixels)}


@scores(ScoreColumn("x", pa.int32(), "fractions"))
def fractions(images: Scored) -> dict[str, Any]:
    return {"x": [1.5] * len(images.pixels)}


@scores(ScoreColumn("x", pa.int32(), "none"))
def hungry(images: Scored) -> dict[str, Any]:
    raise MemoryError("no more")


@pytest.mark.parametrize(
    ("scorer", "kind", "said"),
    [
        (forgets, ModelError, "returned nothing of its column x"),
        (too_few, ModelError, "returned 1 values of its column x for 4 images"),
        (wrong_type, ModelError, "its column x are not of the type int32"),
        (fractions, ModelError, "not of the type int32 that it names: 1.5 is no whole number"),
        (hungry, OutOfMemory, "no more"),
    ],
)
def test_a_scorer_that_breaks_its_promise_is_named(
    ledger: Ledger, scorer: Any, kind: type[Exception], said: str
) -> None:
    marker = ledger.marker(0)
    assert marker is not None
    with pytest.raises(kind, match=said):
        rescore([scorer], ledger, ledger.parts()[0], marker, Trial())


def test_a_damaged_shard_fails_alone(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    marker = ledger.marker(0)
    assert marker is not None
    ledger.store.put(marker.files[0].name, b"damaged")
    with pytest.raises(RetryShard, match="missing or damaged"):
        rescore([counted], ledger, ledger.parts()[0], marker, Trial())


@pytest.mark.parametrize(
    ("asked", "saved", "same"),
    [
        ("quality", {"scorer": "quality", "options": {"dark_below": 200}}, False),
        ("quality", {"scorer": "quality", "options": {"dark_below": 48}}, True),
        ("own:make", {"scorer": "own:make", "options": {"shift": 1}}, False),
        ("own:make=a", {"scorer": "own:make", "model": "b"}, False),
    ],
)
def test_a_scorer_is_the_same_with_the_same_options(
    asked: str, saved: dict[str, Any], same: bool
) -> None:
    assert read_scorer(asked).asks_for(ScorerSpec.model_validate(saved)) is same


def test_options_and_models_of_own_scorers_are_in_the_fingerprint_of_the_set() -> None:
    facts = Settled(fingerprint="always the same", columns={"one": "double"})
    given = [
        {"scorer": "own:make", "options": {"shift": 1}},
        {"scorer": "own:make", "options": {"shift": 2}},
        {"scorer": "own:make", "model": "a"},
        {"scorer": "own:make"},
    ]
    specs = [ScorerSpec.model_validate({**one, "settled": facts}) for one in given]
    assert len({fingerprint_of([spec]) for spec in specs}) == len(specs)
