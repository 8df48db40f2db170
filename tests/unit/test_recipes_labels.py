"""Labels stay with their image when rows are expanded: declared, renamed, or left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import SpecError
from batchgen.recipes.expand import expand
from batchgen.recipes.job import expanded
from batchgen.recipes.recipe import build_recipe
from tests.datasets_on_disk import png

OBJECTS = [{"bbox": [[1.0, 1.0, 3.0, 3.0]], "category": [0]}] * 4
OTHER = {"variants": 2, "pair": {"with": "other", "label": "source"}}


def write(path: Path, declared: Mapping[str, str] | None, image: str = "photo") -> Path:
    """Four photographs of two classes, each with a box and with the size of the photograph."""
    table = pa.table(
        {
            "key": list("abcd"),
            image: pa.array(
                [{"bytes": png(colour=(number, 0, 0)), "path": None} for number in range(4)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": [0, 1, 0, 1],
            "boxes": OBJECTS,
            "width": [4032] * 4,
            "height": [3024] * 4,
        }
    )
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    own = {
        "columns": dict(declared or {}),
        "mask_classes": [{"name": "ground"}],
        "source": {"a": 1},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    metadata |= {"batchgen": json.dumps(own)} if declared else {}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


DECLARED = {"key": "key", "image": "photo", "label": "label", "objects": "boxes"}


def made(source: Path, tree: Mapping[str, Any]) -> tuple[pa.Schema, dict[str, Any], dict[str, Any]]:
    """The schema of an expansion, and its two metadata."""
    target = source.with_name("rows.parquet")
    expand(build_recipe({"from": str(source), **tree}), str(target))
    schema = pq.read_schema(target)
    own, features = (json.loads(schema.metadata[name]) for name in (b"batchgen", b"huggingface"))
    return schema, own, features["info"]["features"]


@pytest.mark.parametrize("declared", [DECLARED, None])
def test_boxes_never_come_with_the_image_of_another_row(
    declared: dict[str, str] | None, tmp_path: Path
) -> None:
    schema, own, _ = made(write(tmp_path / "in.parquet", declared), OTHER)
    assert "boxes" not in schema.names and "objects" not in own["columns"]
    assert own["columns"]["image"] == "image"


def test_boxes_stay_with_their_own_image(tmp_path: Path) -> None:
    schema, own, features = made(write(tmp_path / "in.parquet", DECLARED), {"variants": 2})
    assert own["columns"] == DECLARED and "boxes" in schema.names
    assert own["source"] == {"a": 1} and "mask_classes" not in own
    assert features["label"] == {"names": ["cat", "dog"], "_type": "ClassLabel"}


def test_sizes_of_photographs_are_not_sizes_to_make(tmp_path: Path) -> None:
    for declared in (DECLARED, None):
        _, own, _ = made(write(tmp_path / "in.parquet", declared), {"variants": 1})
        assert not {"width", "height"} & own["columns"].keys()
    tree = {"variants": 1, "fields": {"width": 64}}
    _, own, _ = made(write(tmp_path / "in.parquet", DECLARED), tree)
    assert own["columns"]["width"] == "width"


def test_labels_of_a_pair_keep_the_names_of_their_classes(tmp_path: Path) -> None:
    _, _, features = made(write(tmp_path / "in.parquet", DECLARED), OTHER)
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    assert features["label"] == features["image_label"] == label


@pytest.mark.parametrize("part", ["image", "objects", "label_mask"])
def test_a_column_about_the_image_of_the_row_is_refused_with_a_pair(
    part: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", None)
    columns = {part: "photo" if part == "image" else "boxes"}
    tree = {
        "task": "image-to-image",
        "input": {"path": str(source), "columns": columns},
        "recipe": OTHER,
    }
    with pytest.raises(SpecError, match=rf"input\.columns\.{part}"):
        expanded(tree, str(tmp_path / "rows"))


def test_the_same_recipe_from_another_folder_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in.parquet", DECLARED)
    names = []
    for place, here in (("in.parquet", tmp_path), (str(tmp_path / "in.parquet"), Path("/"))):
        monkeypatch.chdir(here)
        tree = {"task": "image-to-image", "input": {"path": place}, "recipe": {"variants": 1}}
        names.append(expanded(tree, str(tmp_path / "rows"))["input"]["path"])
    assert names[0] == names[1]
