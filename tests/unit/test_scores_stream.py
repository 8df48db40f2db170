"""Scorers in the stream: their columns in the output, what they read, both layouts, resume."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.engine.scoring import with_scorers
from batchgen.errors import ModelError, PlanChanged, SpecError
from batchgen.images.files import pixels_in
from batchgen.images.perceptual_hash import perceptual_hash
from batchgen.output.ledger import Ledger
from batchgen.output.tally import Tally
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare, read_plan
from batchgen.plan.scores import keep_settled, values_of
from batchgen.report.card import card_of
from batchgen.report.digest import Digest
from batchgen.spec.score_section import ScorerSpec
from batchgen.stages.scorers.scorer import ScoreColumn, Scored, Scores, scores
from batchgen.storage import open_store
from tests.datasets_on_disk import plan_for, png, spec_for, write_columns, write_table
from tests.scored_outputs import make

SEEN: list[Scored] = []


@scores(
    ScoreColumn("words", pa.list_(pa.string()), "words of label, note and prompt"),
    ScoreColumn("boxes", pa.int32(), "number of objects"),
    ScoreColumn("close", pa.float64(), "distance to the conditioning image"),
    ScoreColumn("vector", pa.list_(pa.float16(), 3), "mean colour, 0 to 1"),
    reads=("label", "note", "prompt", "objects", "strength"),
    compares=True,
)
def everything(images: Scored) -> Scores:
    SEEN.append(images)
    texts = zip(images.rows["label"], images.rows["note"], images.rows["prompt"], strict=True)
    means = [pixels.mean(axis=(0, 1)) for pixels in images.pixels]
    sources = [None if one is None else one.mean(axis=(0, 1)) for one in images.sources]
    pairs = zip(means, sources, strict=True)
    return {
        "words": [[str(word) for word in one] for one in texts],
        "boxes": [len(one["bbox"]) for one in images.rows["objects"]],
        "close": [None if b is None else float(abs(a - b).mean()) for a, b in pairs],
        "vector": [(mean / 255).tolist() for mean in means],
    }


@pytest.fixture(autouse=True)
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_scores")
    module.everything = everything  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_scores", module)


def planned(tmp_path: Path, score: list[Any], **dotted: Any) -> Plan:
    colours = [(9, 99, 199), (0, 0, 0), (250, 1, 2), (10, 20, 30), (4, 5, 6)]
    columns = {
        "image": [png(16, 8, colour) for colour in colours],
        "prompt": ["a cat", "a dog", "a flat star", "a bird", "a cat"],
        "kind": ["cat", "dog", "star", "bird", None],
        "note": [1, 2, 3, 4, 5],
        "objects": [[{"bbox": [0, 0, 4, 4], "category": 0}] * count for count in range(5)],
    }
    source = tmp_path / "a.parquet"
    if not source.exists():
        write_columns(source, columns)
    mapped = {f"input__columns__{name}": name for name in ("image", "prompt", "objects")}
    settings = {"input__columns__label": "kind", "task": "image-to-image", "variants": 2, **mapped}
    plan = plan_for(
        source,
        tmp_path / "out",
        **{
            **settings,
            "score": score,
            "resources__batch_size": 3,
            "output__samples_per_shard": 4,
            "sampling__strength": 0.4,
            "labels__categories": ["box"],
            **dotted,
        },
    )
    return with_scorers(plan)


SCORE = ["phash", "quality", "own_scores:everything"]


@pytest.mark.parametrize("layout", ["fused", "staged"])
def test_scores_are_columns_of_the_output_in_both_layouts(tmp_path: Path, layout: str) -> None:
    plan = planned(tmp_path, SCORE)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make(plan, ledger, layout)
    assert verify(ledger).ok
    table = pq.read_table(tmp_path / "out" / "data")
    assert table.num_rows == 8  # without the two flat ones
    by_key = {row["key"]: row for row in table.to_pylist()}
    for row in by_key.values():
        pixels = pixels_in(row["image"]["bytes"])
        assert row["phash"] == perceptual_hash(pixels)
        assert row["words"] == [str(row["label"]), str(row["note"]), row["prompt"]]
        assert row["boxes"] == len(row["objects"]["bbox"]) == row["note"] - 1
        assert row["vector"] == pytest.approx(pixels.mean(axis=(0, 1)) / 255, abs=1e-3)
        assert row["is_blank"] is False and row["sharpness"] > 1000
        source = {1: (9, 99, 199), 2: (0, 0, 0), 4: (10, 20, 30), 5: (4, 5, 6)}[row["note"]]
        far = abs(pixels.mean(axis=(0, 1)) - source).mean()
        assert row["close"] == pytest.approx(far)
    card = card_of(plan, Tally(plan.shards, plan.samples), Digest(), [], None)
    assert "perceptual hash, 64 bits" in card and "number of objects" in card


def test_both_layouts_write_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for layout in ("fused", "staged"):
        plan = planned(tmp_path / layout, SCORE)
        ledger = Ledger(open_store(str(tmp_path / layout / "out")))
        make(plan, ledger, layout)
        markers = ledger.markers(ledger.states(plan).committed)
        digests.append([(one.name, one.sha256) for marker in markers for one in marker.files])
    assert digests[0] == digests[1] and digests[0]


@pytest.mark.parametrize("form", ["webdataset", "image-folder"])
def test_scores_are_in_the_other_formats(tmp_path: Path, form: str) -> None:
    plan = planned(tmp_path, SCORE, output__format=form)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make(plan, ledger, "fused")
    assert verify(ledger).ok, verify(ledger)


def test_a_scorer_gets_no_more_than_it_reads(tmp_path: Path) -> None:
    SEEN.clear()
    make(planned(tmp_path, SCORE), Ledger(open_store(str(tmp_path / "out"))), "fused")
    assert {name for one in SEEN for name in one.rows} == set(everything.reads)


def test_the_plan_is_read_again_with_its_scorers(tmp_path: Path) -> None:
    plan = planned(tmp_path, SCORE)
    again = read_plan(plan.to_json())
    assert again.spec.score == plan.spec.score and again.fingerprint == plan.fingerprint
    assert again.spec.score[0].settled is not None


def test_an_output_is_not_continued_with_other_scorers(tmp_path: Path) -> None:
    plan = planned(tmp_path, ["phash", "quality"])
    dark = {"scorer": "quality", "options": {"dark_below": 3}}
    for score, words in (
        (["phash"], "planned with the scorers phash, quality, now they are phash; "),
        (["phash", dark], "planned with the scorer quality .*, now it is quality .*dark_below 3"),
        ([], "now they are none"),
    ):
        with pytest.raises(PlanChanged, match=words):
            compare(plan, planned(tmp_path, score))
    assert compare(plan, planned(tmp_path, ["phash", "quality"])).spec == plan.spec


def test_a_scorer_whose_version_changed_is_named_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = planned(tmp_path, ["own_scores:everything"])
    spec = saved.spec.model_copy(update={"score": (ScorerSpec(scorer="own_scores:everything"),)})
    kept = replace(saved, spec=keep_settled(spec, saved))
    assert with_scorers(kept).spec == saved.spec
    changed = replace(everything, fingerprint="other/2")
    monkeypatch.setattr(sys.modules["own_scores"], "everything", changed)
    with pytest.raises(ModelError, match="scorer own_scores:everything is not the one that was"):
        with_scorers(kept)


@scores(ScoreColumn("key", pa.string(), ""))
def taken(images: Scored) -> Scores:
    raise AssertionError("planning calls no scorer")


@scores(ScoreColumn("far", pa.float32(), ""), reads=("gone",))
def absent(images: Scored) -> Scores:
    raise AssertionError("planning calls no scorer")


@scores(ScoreColumn("far", pa.float32(), ""), compares=True)
def compared(images: Scored) -> Scores:
    raise AssertionError("planning calls no scorer")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (taken, "it fills a column named 'key'"),
        (absent, "it reads the column 'gone', which the output does not have; its columns: key, "),
        (compared, "it compares with conditioning images, and this task reads none"),
    ],
)
def test_a_scorer_that_does_not_fit_the_job_is_refused_while_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, words: str
) -> None:
    monkeypatch.setattr(sys.modules["own_scores"], "everything", function)
    source = write_columns(tmp_path / "a.parquet", {"prompt": ["a"]})
    plan = plan_for(source, tmp_path / "out", score=["own_scores:everything"])
    with pytest.raises(SpecError, match=words):
        with_scorers(plan)


@pytest.mark.parametrize(
    ("field", "limit", "reason"),
    [
        ("reject_blank", "blank_below", "blank-image"),
        ("reject_dark", "dark_below", "dark-image"),
        ("reject_blurred", "blurred_below", "blurred-image"),
    ],
)
def test_images_are_rejected_by_quality(
    tmp_path: Path, field: str, limit: str, reason: str
) -> None:
    highest = 1e9 if limit == "blurred_below" else 255
    for value, rejected in ((0, 0), (highest, 8)):
        score = [{"scorer": "quality", "options": {limit: value}}]
        folder = tmp_path / str(rejected)
        plan = planned(folder, score, **{f"policy__{field}": True})
        ledger = Ledger(open_store(str(folder / "out")))
        make(plan, ledger, "fused")
        markers = list(ledger.markers(ledger.states(plan).committed))
        assert sum(marker.reasons.get(reason, 0) for marker in markers) == rejected
        assert verify(ledger).ok


@pytest.mark.parametrize(
    ("field", "value", "scorer"),
    [("reject_dark", True, "quality"), ("nsfw", "flag", "nsfw"), ("nsfw", "reject", "nsfw")],
)
def test_a_policy_without_its_scorer_is_refused(field: str, value: Any, scorer: str) -> None:
    with pytest.raises(SpecError, match=f"policy.{field} is set to .* the scorer {scorer}; add it"):
        spec_for("in.parquet", "out", **{f"policy__{field}": value})


@pytest.mark.parametrize(
    ("limit", "first", "values"), [(None, 0, set("abcd")), (3, 0, {"a", "b"}), (3, 2, set("bcd"))]
)
def test_labels_are_those_of_the_rows_of_the_plan(
    tmp_path: Path, limit: int | None, first: int, values: set[str]
) -> None:
    table = pa.table({"prompt": list("123456"), "kind": ["a", "a", "b", None, "c", "d"]})
    for name, rows in (("a", table.slice(0, 4)), ("b", table.slice(4))):
        write_table(tmp_path / "in" / f"{name}.parquet", rows, [1] * rows.num_rows)
    plan = plan_for(tmp_path / "in", tmp_path / "out", input__limit=limit)
    if first:
        plan = replace(plan, rows=4, place=replace(plan.place, first_row=first))
    assert values_of(plan, "kind") == values


RED = ScoreColumn("red", pa.float32(), "")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda count: {"red": [1.0] * (count - 1)}, "returned 2 values of its column red for 3 i"),
        (lambda count: {"red": [1.0] * (count + 1)}, "returned 4 values of its column red for 3 i"),
        (lambda count: {"rad": [1.0] * count}, "returned nothing of its column red for 3 images"),
        (lambda count: {"red": ["a"] * count}, "of its column red are not of the type float that"),
        (lambda count: None, "returned NoneType; needed: a mapping from columns to values"),
    ],
)
def test_a_scorer_that_breaks_its_promise_is_named_in_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: Any, words: str
) -> None:
    broken = scores(RED, version=words)(lambda images: returned(len(images.pixels)))
    monkeypatch.setattr(sys.modules["own_scores"], "everything", broken)
    plan = planned(tmp_path, ["own_scores:everything"])
    with pytest.raises(ModelError, match=words):
        make(plan, Ledger(open_store(str(tmp_path / "out"))), "fused")


def test_figures_that_a_scorer_does_not_name_reject_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(images: Scored) -> Scores:
        every = [True] * len(images.pixels)
        return {"red": [1.0] * len(images.pixels), "is_flat": every, "objects_failed": every}

    monkeypatch.setattr(sys.modules["own_scores"], "everything", scores(RED)(more))
    plan = planned(tmp_path, ["own_scores:everything"])
    make(plan, Ledger(open_store(str(tmp_path / "out"))), "fused")
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 8


@pytest.mark.parametrize("name", ["is_flat", "Is_Blank", "objects_failed", "Pixel_Mean"])
def test_what_filters_read_cannot_be_filled_by_another_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = scores(ScoreColumn(name, pa.bool_(), ""))(lambda images: {})
    monkeypatch.setattr(sys.modules["own_scores"], "everything", other)
    with pytest.raises(SpecError, match=f"it fills (the column )?{name}, "):
        planned(tmp_path, ["own_scores:everything"])


def test_a_scorer_cannot_change_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def darken(images: Scored) -> Scores:
        for pixels in images.pixels:
            pixels[:] = 0
        return {"red": [1.0] * len(images.pixels)}

    monkeypatch.setattr(sys.modules["own_scores"], "everything", scores(RED)(darken))
    plan = planned(tmp_path, ["own_scores:everything"])
    with pytest.raises(ValueError, match="read-only"):
        make(plan, Ledger(open_store(str(tmp_path / "out"))), "fused")
