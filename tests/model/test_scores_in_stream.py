"""Scorers with models in the stream: the same bytes in both layouts, marked objects, rejects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchgen.curate.score_request import Request, settled
from batchgen.engine.scoring import with_scorers
from batchgen.errors import SpecError
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.plan.plan import Plan
from batchgen.storage import open_store
from tests import scorer_models
from tests.datasets_on_disk import plan_for, png, write_columns
from tests.scored_outputs import make

KINDS = ["cat", "dog", "bird", "cat", None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    scorer_models.clip(folder / "clip")
    scorer_models.classifier(folder / "classifier", ["cat", "dog", "bird"])
    scorer_models.detector(folder / "detector", ["box", "ball"])
    return folder


def planned(tmp_path: Path, score: list[Any], **dotted: Any) -> Plan:
    source = tmp_path / "a.parquet"
    objects = {"bbox": [[0.0, 0.0, 4.0, 4.0], [8.0, 2.0, 3.0, 3.0]], "category": [0, 1]}
    write_columns(
        source,
        {
            "image": [png(16, 8, (number * 40, 99, 9)) for number in range(5)],
            "prompt": [f"picture {number}" for number in range(5)],
            "kind": KINDS,
            "objects": [{**objects, "iscrowd": [0, 0]} for _ in range(5)],
        },
    )
    mapped = {f"input__columns__{name}": name for name in ("image", "prompt", "objects")}
    settings = {
        **{**mapped, "input__columns__label": "kind", "task": "image-to-image", "variants": 2},
        **{"resources__batch_size": 3, "output__samples_per_shard": 4},
        **{"sampling__strength": 0.4, "labels__categories": ["box", "ball"], "score": score},
    }
    return with_scorers(plan_for(source, tmp_path / "out", **{**settings, **dotted}))


def every(models: Path) -> list[Any]:
    return [
        {"scorer": "clip", "model": str(models / "clip")},
        f"zero-shot={models / 'clip'}",
        f"classifier={models / 'classifier'}",
        {
            "scorer": "detector",
            "model": str(models / "detector"),
            "options": {"mark_crowd": True, "min_iou": 0.9},
        },
        f"source={models / 'clip'}",
        f"embedding={models / 'clip'}",
    ]


def test_both_layouts_write_the_same_bytes(tmp_path: Path, models: Path) -> None:
    digests = []
    for layout in ("fused", "staged"):
        (tmp_path / layout).mkdir()
        plan = planned(tmp_path / layout, every(models))
        ledger = Ledger(open_store(str(tmp_path / layout / "out")))
        make(plan, ledger, layout)
        assert verify(ledger).ok
        markers = ledger.markers(ledger.states(plan).committed)
        digests.append([(one.name, one.sha256) for marker in markers for one in marker.files])
    assert digests[0] == digests[1] and len(digests[0]) == 3
    table = pq.read_table(tmp_path / "fused" / "out" / "data")
    assert table.num_rows == 10
    for row in table.to_pylist():
        assert row["class_agrees"] is (
            None if row["label"] is None else row["predicted_label"] == row["label"]
        )
        assert -1 <= row["clip_similarity"] <= 1 and -1 <= row["source_similarity"] <= 1
        assert row["objects"]["iscrowd"] == [int(iou < 0.9) for iou in row["object_iou"]] == [1, 1]
        assert row["objects_found"] == 0 and len(row["embedding"]) == 24


def test_variants_of_a_row_have_marks_of_their_own(tmp_path: Path, models: Path) -> None:
    limit = {"mark_crowd": True, "min_iou": 0.02, "threshold": 0.5}
    score = [{"scorer": "detector", "model": str(models / "detector"), "options": limit}]
    plan = planned(tmp_path, score, output__format="image-folder")
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make(plan, ledger, "fused")
    assert verify(ledger).ok


@pytest.mark.parametrize(("policy", "kept"), [("reject", 0), ("flag", 10), ("off", 10)])
def test_unsafe_images_are_rejected_or_counted(
    tmp_path: Path, models: Path, policy: str, kept: int
) -> None:
    options = {"unsafe": ["cat", "dog", "bird"]}  # together 1
    score = [{"scorer": "nsfw", "model": str(models / "classifier"), "options": options}]
    plan = planned(tmp_path, score, policy__nsfw=policy)
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make(plan, ledger, "fused")
    assert verify(ledger).ok
    markers = list(ledger.markers(ledger.states(plan).committed))
    assert sum(marker.counts.accepted for marker in markers) == kept
    flagged = sum(marker.measures.get("flagged not-safe", 0) for marker in markers)
    assert flagged == (10 if policy == "flag" else 0)
    reasons = sum(marker.reasons.get("not-safe", 0) for marker in markers)
    assert reasons == (10 if policy == "reject" else 0)


def test_classes_that_are_missing_are_found_while_planning(tmp_path: Path, models: Path) -> None:
    scorer_models.classifier(tmp_path / "two", ["cat", "bird"])
    with pytest.raises(SpecError, match="these labels have no class in it: 'dog'; its classes"):
        planned(tmp_path, [f"classifier={tmp_path / 'two'}"])


@pytest.mark.parametrize("given", [[0, 1, 0], ["cat", "dog", "cat"]])
def test_classes_of_a_class_conditional_model_are_matched_by_name(
    tmp_path: Path, given: list[Any]
) -> None:
    folder = scorer_models.classifier(tmp_path / "model", ["dog", "cat"])
    source = write_columns(tmp_path / "b.parquet", {"k": given})
    options = {"label": "class_label"}
    plan = plan_for(
        source,
        tmp_path / "out",
        task="class-conditional",
        input__columns__class_label="k",
        score=[{"scorer": "classifier", "model": str(folder), "options": options}],
    )
    plan = replace(plan, model=replace(plan.model, class_names=("cat", "dog", "")))
    (spec,) = with_scorers(plan).spec.score
    assert spec.settled is not None and spec.settled.classes == {"0": 1, "1": 0}


BOXES = [{"bbox": [0.0, 0.0, 20.0, 20.0], "iscrowd": 0}] * 2


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize(
    ("given", "options", "classes"),
    [
        (["car", "dog"], {"classes": {"car": "automobile"}}, {"car": 0, "dog": 1}),
        (["automobile", "dog"], {}, {"automobile": 0, "dog": 1}),
        ([0, 1], {}, {"0": 0, "1": 1}),
        ([7, 8], {"classes": {"7": "dog", "8": 0}}, {"7": 1, "8": 0}),
    ],
)
def test_categories_that_occur_are_matched_with_the_detector(
    tmp_path: Path, struct: bool, given: list[Any], options: dict[str, Any], classes: dict[str, int]
) -> None:
    folder = scorer_models.detector(tmp_path / "detector", ["automobile", "dog"])
    objects: Any = [
        [{**box, "category": one} for box, one in zip(BOXES, given, strict=True)],
        [{**BOXES[0], "category": given[0]}],
    ]
    if struct:
        names = ("bbox", "iscrowd", "category")
        objects = [{name: [one[name] for one in row] for name in names} for row in objects]
    pictures = [png(32, 32, (9, 99, 199)), png(32, 32, (9, 9, 19))]
    columns = {"image": pictures, "prompt": ["a", "b"], "objects": objects}
    source = write_columns(tmp_path / "b.parquet", columns)
    mapped = {f"input__columns__{name}": name for name in ("image", "prompt", "objects")}
    loose = {"threshold": 0.0, "min_iou": 0.01, "mark_crowd": True}

    def settle(**also: Any) -> Plan:
        score = {"scorer": "detector", "model": str(folder), "options": {**loose, **also}}
        settings = {**mapped, "task": "image-to-image", "sampling__strength": 0.4}
        return with_scorers(plan_for(source, tmp_path / "out", score=[score], **settings))

    plan = settle(**options)
    (spec,) = plan.spec.score
    assert spec.settled is not None and spec.settled.classes == classes
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make(plan, ledger, "fused")
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert sum(row["objects_found"] for row in rows) > 0
    for row in rows:
        assert row["objects"]["iscrowd"] == [int(iou < 0.01) for iou in row["object_iou"]]
    _, score_specs = settled(
        ledger, Request((spec.model_copy(update={"settled": None}),)), ledger.parts()
    )
    assert score_specs[0].settled is not None and score_specs[0].settled.classes == classes
    if options:
        with pytest.raises(SpecError, match=f"have no class in it: {given[0]!r}"):
            settle()


def zero_shot(tmp_path: Path, models: Path, options: dict[str, Any], **dotted: Any) -> Plan:
    score = {"scorer": "zero-shot", "model": str(models / "clip"), "options": options}
    columns = {"prompt": ["a cat", "a dog", "a cat"], "kind": ["cat", "dog", "cat"]}
    source = write_columns(tmp_path / "c.parquet", columns)
    return with_scorers(plan_for(source, tmp_path / "out", score=[score], **dotted))


def test_prompts_can_be_the_labels(tmp_path: Path, models: Path) -> None:
    plan = zero_shot(tmp_path, models, {"label": "prompt", "template": "{label}"})
    ledger = Ledger(open_store(str(tmp_path / "out")))
    make(plan, ledger, "fused")
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert {row["zero_shot_label"] for row in rows} <= {"a cat", "a dog"} and len(rows) == 3


@pytest.mark.parametrize("name", ["key", "variant", "seed", "width", "source_id"])
def test_columns_that_the_run_makes_are_no_classes(tmp_path: Path, models: Path, name: str) -> None:
    words = f"options.label: got {name!r}; allowed: a column of classes that the input has: kind"
    with pytest.raises(SpecError, match=words):
        zero_shot(tmp_path, models, {"label": name, "classes": ["a", "b"]})
