"""Expansion: rows, classes, pairs and balance become a table with one row for each sample."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError, SpecError
from batchgen.labels.columns import IMAGE
from batchgen.plan.keys import is_safe
from batchgen.recipes.expand import Expansion, expand
from batchgen.recipes.recipe import Recipe, build_recipe
from batchgen.recipes.samples import sample_key
from tests.fuzzing import fuzz
from tests.recipes import reasons_of, rows_of

TOP = [
    field.alias or name for name, field in Recipe.model_fields.items()
]  # the fields of a recipe, as they are written
WORDS = st.sampled_from(
    [
        *("name", "id", "key", "label", "text", "weight", "uniform", "normal", "mean", "std"),
        *("choice", "each", "column", "template", "ask", "prompt", "with", "value", "step"),
        *("strength", "x", "images", "into", "target", "low", "high", "function", "count"),
    ]
)
NAMES = ["circle", "square", "star"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images by bytes, four of each class, with a ClassLabel and objects."""
    return write_photos(tmp_path / "photos.parquet")


def write_photos(path: Path, count: int = 12, by_path: bool = False) -> Path:
    images = [
        {"bytes": None if by_path else b"image %d" % n, "path": f"img/{n}.png" if by_path else None}
        for n in range(count)
    ]
    table = pa.table(
        {
            "key": [f"photo-{n}" for n in range(count)],
            "image": pa.array(images, IMAGE),
            "label": pa.array([n % 3 for n in range(count)], pa.int64()),
            "objects": [[{"bbox": [0.0, 0.0, 1.0, 1.0], "category": n % 3}] for n in range(count)],
            "file_name": [f"{n}.png" for n in range(count)],
        }
    )
    label = {"names": NAMES, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    parts = {"key": "key", "image": "image", "label": "label", "objects": "objects"}
    own = {"columns": parts, "categories": [{"name": name} for name in NAMES]}
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "batchgen": json.dumps(own),
    }
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=5)
    return path


def test_the_file_has_the_columns_and_says_what_they_are(photos: Path, tmp_path: Path) -> None:
    recipe = {
        "from": str(photos),
        "variants": 2,
        "templates": "a photo of a {{ class.name }}",
        "negative_prompt": "blurry",
        "fields": {"strength": {"uniform": [0.3, 0.8], "step": 0.1}},
    }
    made = expand(build_recipe(recipe), str(tmp_path / "rows.parquet"))
    assert (made.rows, made.samples, made.rejected, made.rejects) == (12, 24, {}, "")
    table = pq.read_table(tmp_path / "rows.parquet")
    own = json.loads(table.schema.metadata[b"batchgen"])
    assert own["categories"] == [{"name": name} for name in NAMES]
    assert own["columns"] == {
        **{name: name for name in ("prompt", "negative_prompt", "strength")},
        **{name: name for name in ("key", "image", "label", "objects")},
    }
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == NAMES
    assert features["image"] == {"_type": "Image"}
    row = table.to_pylist()[3]
    assert row["row_key"] == "photo-1" and row["variant"] == 1 and row["key"] == "photo-1-v1"
    assert row["prompt"] == "a photo of a square" and row["image"]["bytes"] == b"image 1"
    assert row["template"] == "prompt" and row["file_name"] == "1.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.parquet", "rows.parquet"]


def test_datasets_reads_the_file(photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    recipe = {"from": str(photos), "templates": "a {{ class.name }}"}
    expand(build_recipe(recipe), str(tmp_path / "rows.parquet"))
    schema = pq.read_schema(tmp_path / "rows.parquet")
    features = datasets.Features.from_arrow_schema(schema)
    assert features["label"].names == NAMES
    assert isinstance(features["image"], datasets.Image)


def test_paths_of_images_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photos = write_photos(tmp_path / "in" / "photos.parquet", by_path=True)
    rows = rows_of({"from": str(photos)})
    assert rows["photo-4-v0"]["image"]["path"] == f"{tmp_path}/in/img/4.png"


def test_rejected_samples_are_in_a_file_with_reason_and_place(tmp_path: Path) -> None:
    table = pa.table({"key": ["a", "b", None], "name": ["cat", None, "dog"], "level": [1, 2, 3]})
    pq.write_table(table, tmp_path / "in.parquet")
    recipe = {
        "from": str(tmp_path / "in.parquet"),
        "variants": 2,
        "templates": "a {{ name }}",
    }
    made = expand(build_recipe(recipe), str(tmp_path / "rows.parquet"))
    assert made.samples == 2
    assert made.rejected == {"undefined-variable": 2, "null-key": 2}
    assert made.rejected_fraction == pytest.approx(4 / 6)
    rejects = pq.read_table(tmp_path / "rows-rejects.parquet").to_pylist()
    assert sum(one["samples"] for one in rejects) == 4
    one = next(one for one in rejects if one["key"] == "b-v1")
    assert one["source"] == "in.parquet#1" and "'name' is undefined" in one["message"]
    again = {**recipe, "templates": "a {{ name | default('thing') }}", "key": "level"}
    made = expand(build_recipe(again), str(tmp_path / "rows.parquet"))
    assert made.samples == 6 and not (tmp_path / "rows-rejects.parquet").exists()


def test_nothing_is_written_if_nothing_can_be_made(tmp_path: Path) -> None:
    recipe = build_recipe({"from": ["cat"], "templates": "a {{ nmae }}"})
    with pytest.raises(InputError, match=r"all samples were rejected.*'nmae' is undefined"):
        expand(recipe, str(tmp_path / "rows.parquet"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "rows.parquet"
    expand(build_recipe({"from": ["cat"], "templates": "a"}), str(target))
    before = target.read_bytes()
    twice = [{"key": "a", "x": 1}, {"key": "a", "x": 2}]
    with pytest.raises(InputError, match="rows 0 and 1 of from have the same key"):
        expand(build_recipe({"from": twice, "templates": "a"}), str(target))
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_keys_are_safe_and_bounded() -> None:
    names = ["Émile/../x", "a" * 300, "cat"]
    rows = rows_of({"from": names, "fields": {"lora": {"each": ["", "ink:0.8", "a,b" * 50]}}})
    assert len(rows) == 9
    assert all(is_safe(key) and len(key) <= 100 for key in rows)
    assert sample_key("x" * 99, 1) != sample_key("x" * 98 + "y", 1)


def test_fields_can_be_read_by_templates_and_later_fields() -> None:
    tree = {
        "from": ["cat"],
        "variants": 30,
        "fields": {
            "colour": {"choice": ["red", "blue"]},
            "phrase": {"template": "{{ colour }} {small|large}"},
        },
        "templates": "a {{ phrase }} {{ name }}",
    }
    prompts = {row["prompt"] for row in rows_of(tree).values()}
    assert prompts == {f"a {c} {s} cat" for c in ("red", "blue") for s in ("small", "large")}


CLASSES = [
    {"id": 0, "name": "circle", "definition": "a round shape", "synonyms": ["ring", "disc"]},
    {"id": 1, "name": "square", "definition": "four equal sides"},
]


def test_classes_are_joined_by_id_and_unknown_ones_rejected(photos: Path) -> None:
    tree = {"from": str(photos), "classes": CLASSES, "templates": "{{ class.definition }}"}
    prompts = {row["label"]: row["prompt"] for row in rows_of(tree).values()}
    assert prompts == {0: "a round shape", 1: "four equal sides"}
    assert reasons_of(tree) == {"unknown-class": 4}


def test_classes_without_rows_are_the_rows(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text(
        "id,name,synonyms,definition\n0,cat,kitty; puss,a pet\n1,dog,,\n"
    )
    tree = {
        "classes": str(tmp_path / "classes.csv"),
        "variants": 20,
        "templates": "{{ class.synonyms | default([class.name], true) | pick }}",
    }
    rows = rows_of(tree)
    assert {(row["label"], row["prompt"]) for row in rows.values()} == {
        (0, "kitty"),
        (0, "puss"),
        (1, "dog"),
    }
    pq.write_table(pa.table({"name": ["cat", "dog"]}), tmp_path / "classes.parquet")
    by_name = rows_of(
        {"classes": str(tmp_path / "classes.parquet"), "templates": "{{ class.name }}"}
    )
    assert {row["label"] for row in by_name.values()} == {"cat", "dog"}
    mapped = rows_of({"classes": {"cat": ["kitty"], "dog": "a pet", "emu": None}})
    assert list(mapped) == ["cat-v0", "dog-v0", "emu-v0"]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([{"id": 1}], "has no name"),
        ([{"name": 3}], "has no name"),
        (["cat", "cat"], "same name 'cat'"),
        ([{"name": "a", "id": 1}, {"name": "b", "id": 1}], "same id 1"),
        ([7], "needed: a name"),
        ([], "0 classes"),
    ],
)
def test_a_wrong_table_of_classes_is_refused(classes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        rows_of({"classes": classes, "templates": "x"})


def test_one_row_without_any_source() -> None:
    assert list(rows_of({"variants": 2, "templates": "a star"})) == [
        "row-00000000-v0",
        "row-00000000-v1",
    ]


def paired(photos: Path, variants: int = 8, **pair: Any) -> list[dict[str, Any]]:
    tree = {
        "from": str(photos),
        "variants": variants,
        "pair": pair,
        "fields": {"strength": {"uniform": [0.7, 0.9]}},
    }
    return list(rows_of(tree).values())


def number(row: dict[str, Any]) -> int:
    return int(row["row_key"].removeprefix("photo-"))


def test_a_pair_of_the_own_class_is_another_image_of_it(photos: Path) -> None:
    rows = paired(photos, **{"with": "own"})
    for row in rows:
        assert row["image_key"] != row["row_key"]
        assert row["image_label"] == row["label"] == number(row) % 3
        place = int(row["image_key"].removeprefix("photo-"))
        assert row["image"]["bytes"] == b"image %d" % place
    assert len({row["image_key"] for row in rows}) == 12


def test_a_pair_of_another_class_keeps_the_label_of_the_row(photos: Path) -> None:
    rows = paired(photos, **{"with": "other"})
    assert all(row["image_label"] != row["label"] == number(row) % 3 for row in rows)
    assert {(row["label"], row["image_label"]) for row in rows} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }


def test_a_pair_can_give_its_label_or_soft_labels(photos: Path) -> None:
    for row in paired(photos, **{"with": "other", "label": "source"}):
        assert row["label"] == row["image_label"] != number(row) % 3
    for row in paired(photos, **{"with": "other", "label": "soft", "gamma": 0.5}):
        own, other = row["soft_label"]
        assert own["label"] == row["label"] and other["label"] == row["image_label"]
        assert own["weight"] == pytest.approx(row["strength"] ** 0.5)
        assert own["weight"] + other["weight"] == pytest.approx(1)


def test_labels_of_pixels_that_a_pair_replaces_are_not_carried(photos: Path) -> None:
    """The boxes of one image are wrong for another."""
    assert all("objects" not in row for row in paired(photos, **{"with": "other"}))
    assert all("objects" in row for row in paired(photos, **{"with": "own", "into": "control"}))


def test_an_added_image_takes_samples_and_changes_no_other(tmp_path: Path) -> None:
    few = paired(write_photos(tmp_path / "few.parquet", 12), **{"with": "other"})
    many = paired(write_photos(tmp_path / "many.parquet", 15), **{"with": "other"})
    after = {row["key"]: row["image_key"] for row in many}
    moved = [row for row in few if after[row["key"]] != row["image_key"]]
    assert 0 < len(moved) < len(few) / 2
    assert {after[row["key"]] for row in moved} <= {"photo-12", "photo-13", "photo-14"}


def test_two_pairs_give_two_images(photos: Path, tmp_path: Path) -> None:
    rows = [
        {"key": "a", "label": "star", "which": "photo-4"},
        {"key": "b", "label": "circle", "which": "none"},
    ]
    pairs = [
        {"with": "own", "images": str(photos)},
        {"with": {"column": "which"}, "images": str(photos), "into": "control"},
    ]
    tree = {"from": rows, "variants": 5, "pair": pairs}
    made = rows_of(tree)
    assert {row["image_label"] for row in made.values()} == {"star"}
    assert {row["control_key"] for row in made.values()} == {"photo-4"}
    assert reasons_of(tree) == {"no-pair": 5}


def test_a_class_without_images_costs_its_rows(photos: Path) -> None:
    rows = [
        {"key": "a", "label": "comet"},
        {"key": "b", "label": "star"},
        {"key": "c", "label": None},
    ]
    tree = {"from": rows, "pair": {"with": "own", "images": str(photos)}}
    assert list(rows_of(tree)) == ["b-v0"]
    assert reasons_of(tree) == {"unknown-class": 1, "null-class": 1}


def test_balance_counts_sources_if_told(photos: Path) -> None:
    table = pq.read_table(photos).slice(0, 7)  # 3, 2 and 2 of each class
    pq.write_table(table, photos)
    base = {"from": str(photos), "templates": "{{ class.name }}"}
    made = rows_of(
        {**base, "balance": {"column": "label", "target": "max", "include_sources": True}}
    )
    assert sorted(row["label"] for row in made.values()) == [1, 2]
    made = rows_of({**base, "balance": {"column": "label", "target": 5}})
    assert sorted(row["label"] for row in made.values()) == [0] * 5 + [1] * 5 + [2] * 5
    both = {"scheduler": {"each": ["DDIMScheduler", "EulerDiscreteScheduler"]}}
    made = rows_of({**base, "fields": both, "balance": {"column": "label", "target": 5}})
    assert sorted(row["label"] for row in made.values()) == [0] * 5 + [1] * 5 + [2] * 5
    later = rows_of({**base, "balance": {"column": "label", "target": 5}}, (1, 2))
    assert set(later) <= set(rows_of({**base, "balance": {"column": "label", "target": 5}}))


FAULTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"templats": "x"}, ["templats: there is no such field", "did you mean 'templates'"]),
    ({"seed": -1, "variants": "3:2"}, ["seed: got -1", "variants: got '3:2'"]),
    ({"fields": {"strength": 1.5}}, ["fields.strength.value: got 1.5", "less than or equal to 1"]),
    ({"fields": {"strength": {"uniform": [0.3, 2]}}}, ["fields.strength.uniform: got 2"]),
    ({"fields": {"x": {"uniform": [3, 1]}}}, ["fields.x", "the lower one first"]),
    ({"fields": {"x": {"log_uniform": [0, 1]}}}, ["fields.x", "above 0"]),
    ({"fields": {"x": {"uniform": [1, 2, 3]}}}, ["fields.x.uniform"]),
    ({"fields": {"x": {"uniform": [0, float("nan")]}}}, ["fields.x.uniform"]),
    ({"fields": {"x": {"normal": {"mean": 0, "std": 0}}}}, ["fields.x.normal.std: got 0"]),
    ({"fields": {"x": {"normal": {"mean": 0, "std": 1, "low": 9}}}}, ["6 standard deviations"]),
    ({"fields": {"x": {"choice": {}}}}, ["fields.x", "one value or more"]),
    ({"fields": {"x": {"choice": [1, "a"]}}}, ["fields.x", "one type"]),
    ({"fields": {"x": {"each": [1, 1]}}}, ["fields.x", "each value once"]),
    ({"fields": {"x": {"uniform": [1, 2], "choice": [1]}}}, ["uniform and choice is set"]),
    ({"fields": {"x": {"choice": [1], "step": 2}}}, ["fields.x", "step only with"]),
    ({"fields": {"num_inference_steps": 0}}, ["fields.num_inference_steps.value: got 0"]),
    ({"fields": {"width": {"choice": [100]}}}, ["fields.width.choice: got 100", "multiple of 8"]),
    ({"fields": {"a b": 1, "key": 2}}, ["fields.a b", "fields.key"]),
    ({"fields": {"prompt": "x"}, "templates": "y"}, ["fields.prompt"]),
    (
        {"balance": {"column": "l", "target": 5}, "variants": 2},
        ["variants is set to 2, but balance"],
    ),
    ({"pair": {"with": "none", "images": "x"}}, ["pair.0.with.partner: got 'none'"]),
    ({"pair": {"with": "own"}}, ["pair.images: got nothing"]),
    ({"pair": {"with": "own", "images": "x", "label": "soft"}}, ["fields.strength, which is not"]),
    ({"each_template": True}, ["each_template is set to True, but there are no templates"]),
    ({"fields": {"x": {"ask": {"prompt": "p", "with": {"key_env": "sk-12 34"}}}}}, ["key_env"]),
]


@pytest.mark.parametrize(("tree", "said"), FAULTS, ids=lambda one: str(one)[:50])
def test_faults_of_a_recipe_are_named(tree: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(SpecError) as told:
        build_recipe(tree)
    assert all(words in str(told.value) for words in said), str(told.value)


def test_all_faults_are_told_at_once() -> None:
    tree = {
        "seed": -1,
        "fields": {"strength": 7, "x": {"choice": {}}},
        "templats": 1,
        "variants": 0,
    }
    with pytest.raises(SpecError) as told:
        build_recipe(tree)
    lines = str(told.value).splitlines()
    assert len(lines) == 5, lines


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"from": "/nowhere.parquet"}, "no such file"),
        ({"from": []}, "no rows"),
        ({"from": [{"a": 1}, {"a": "x"}]}, "one type"),
        ({"from": ["cat"], "key": "id"}, "no column 'id'"),
        ({"from": ["cat"], "fields": {"x": {"column": "nmae"}}}, "did you mean 'name'"),
        ({"from": ["cat"], "balance": {"column": "label2", "target": 1}}, "no column 'label2'"),
        ({"wildcards": "/nowhere"}, "no such file or folder"),
        ({"from": ["cat"], "label": "x", "classes": ["cat"], "templates": "a"}, "no column 'x'"),
    ],
)
def test_wrong_sources_are_named(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        rows_of(tree)


def test_hostile_sources_cost_their_rows_or_are_named(tmp_path: Path) -> None:
    buffers = pa.array([b"fine", b"\xff\xfe"]).buffers()
    wrong = pa.Array.from_buffers(pa.string(), 2, buffers)
    table = pa.table({"key": ["a", "b"], "text": wrong, "label": wrong})
    pq.write_table(table, tmp_path / "in.parquet")
    base = {"from": str(tmp_path / "in.parquet")}
    assert list(rows_of({**base, "templates": "a {{ text }}"})) == ["a-v0"]
    assert reasons_of({**base, "templates": "a {{ text }}"}) == {"not-utf8": 1}
    assert reasons_of({**base, "classes": ["fine"], "templates": "a"}) == {"unknown-class": 1}
    pool = write_photos(tmp_path / "photos.parquet")
    pair = {"with": "own", "images": str(pool)}
    assert reasons_of({**base, "pair": pair}) == {"unknown-class": 2}
    listed = pa.table({"key": ["a"], "label": [[1]]})
    pq.write_table(listed, tmp_path / "in.parquet")
    with pytest.raises(InputError, match="needed: text or whole numbers"):
        rows_of({**base, "templates": "a"})
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a complete Parquet file"):
        rows_of({**base, "templates": "a"})
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "in.parquet")
    with pytest.raises(InputError, match="two columns 'a'"):
        rows_of({**base, "templates": "a"})


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"key": [str(n) for n in range(1000)]}), path, compression="none")
    data = bytearray(path.read_bytes())
    data[20:200] = b"\xff" * 180
    path.write_bytes(data)
    with pytest.raises(InputError, match=str(path)):
        rows_of({"from": str(path), "templates": "a {{ key }}"})


def test_columns_of_any_type_are_carried(tmp_path: Path) -> None:
    words = pa.array(["x", "y", "x"]).dictionary_encode()
    columns = {
        "key": ["a", "b", "c"],
        "word": words,
        "list": [[1], [], None],
        "time": pa.array([1, 2, 3], pa.timestamp("us")),
        "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "view": pa.array(["p", "q", "r"], pa.string_view()),
        "label": words,
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=1)
    recipe = {
        "from": str(tmp_path / "in.parquet"),
        "variants": 2,
        "templates": "{{ class.name }} {{ view }}",
    }
    expand(build_recipe(recipe), str(tmp_path / "rows.parquet"))
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == ["x p", "x p", "y q", "y q", "x r", "x r"]
    assert rows[0]["list"] == [1] and rows[0]["map"] == [("k", 1)] and rows[2]["word"] == "y"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.sampled_from(["own", "max", "label", "name", "A:B", "0:2", "", "{a|b}", "\ud800", "x\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@fuzz()
@given(st.dictionaries(st.sampled_from(sorted(TOP)), VALUES, max_size=5))
def test_any_tree_is_a_recipe_or_is_refused(tree: dict[str, Any]) -> None:
    try:
        build_recipe(tree)
    except (SpecError, InputError) as error:
        assert str(error)


@fuzz()
@given(VALUES)
def test_any_rows_and_classes_are_read_or_refused(value: Any) -> None:
    for name in ("from", "classes"):
        if isinstance(value, str):
            continue  # a path
        try:
            recipe = build_recipe({name: value, "templates": "{{ name | default('x') }}"})
            with closing(Expansion(recipe)) as made:
                list(made.tables())
        except (SpecError, InputError) as error:
            assert str(error)


def test_objects_are_counted_with_the_names_of_their_categories(photos: Path) -> None:
    rows = rows_of({"from": str(photos), "templates": "{{ objects | counted }}"})
    assert rows["photo-1-v0"]["prompt"] == "a square"
    assert rows["photo-2-v0"]["objects"][0].keys() == {"bbox", "category"}
    names = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    feature = {"bbox": {}, "category": {"feature": names, "_type": "List"}}
    table = pa.table({"key": ["a"], "objects": [{"bbox": [[0.0] * 4] * 3, "category": [1, 0, 1]}]})
    metadata = {"huggingface": json.dumps({"info": {"features": {"objects": feature}}})}
    pq.write_table(table.replace_schema_metadata(metadata), photos)
    rows = rows_of({"from": str(photos), "templates": "{{ objects | counted }}"})
    assert rows["a-v0"]["prompt"] == "two dogs and a cat"
