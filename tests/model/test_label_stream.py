"""Labels through the real stream: they lie on the pixels that the shipped model makes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchgen.images.conditions import grow_mask
from batchgen.labels.rle import drawn
from batchgen.models.tiny import BUILDERS
from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import open_store
from jobs import labelled_shapes
from jobs.labelled_shapes import COLOURS
from tests.in_process import stream
from tests.outputs import digests_of, table_of

COLUMNS = {"key": "key", "objects": "objects", "label_mask": "label_mask", "image": "image"}
SHIPPED = "digits-shapes"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "scenes.parquet"
    pq.write_table(labelled_shapes.table(), path)
    return path


def make(scenes: Path, output: Path, dotted: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a job over the first scenes; returns the rows of its output, which verifies."""
    tree = {
        "task": "image-to-image",
        "input": {"path": str(scenes), "columns": COLUMNS, "limit": 4},
        "sampling": {"num_inference_steps": 20, "strength": 0.1},
        "output": {"url": str(output), "samples_per_shard": 4},
        "resources": {"batch_size": 2},
    }
    stream(build(merge(tree, dotted)))
    findings = verify(Ledger(open_store(str(output))))
    assert findings.ok, findings.problems
    rows: list[dict[str, Any]] = table_of(output).to_pylist()
    return rows


def pixels_of(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)))


def shapes_in(row: dict[str, Any]) -> Array:
    """Where the made image has the colour of its shapes: bool (height, width)."""
    words = row["prompt"].split()
    front, back = (np.array(COLOURS[one], float) for one in (words[1], words[-2]))
    pixels = pixels_of(row["image"]["bytes"]).astype(float)
    near: Array = ((pixels - front) ** 2).sum(axis=2) < ((pixels - back) ** 2).sum(axis=2)
    return near


def iou(one: Array, two: Array) -> float:
    return float(np.logical_and(one, two).sum() / np.logical_or(one, two).sum())


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ("fill", (192, 160)),
        ("fit", (192, 192)),
        ("stretch", (160, 192)),
        ("multiple-of", None),
    ],
)
def test_polygons_masks_and_keypoints_lie_on_the_made_pixels(
    resize: str, size: tuple[int, int] | None, tmp_path: Path
) -> None:
    large = tmp_path / "large.parquet"
    pq.write_table(labelled_shapes.table(scale=2), large)
    dotted: dict[str, Any] = {"conditioning.resize": resize, "input.path": str(large)}
    if size is not None:
        dotted |= {"sampling.width": size[0], "sampling.height": size[1]}
    for row in make(large, tmp_path / "out", dotted):
        assert row["labels_are"] == "kept" and row["objects_dropped"] == 0
        made, classes = shapes_in(row), pixels_of(row["label_mask"]["bytes"])
        # The padding of `fit` is black, and the pixels beside it mix with it.
        inside = ~grow_mask(classes == 255, 3)
        polygons = [tuple(one) for each in row["objects"]["segmentation"] for one in each]
        height, width = made.shape
        assert iou(made & inside, drawn(polygons, (width, height)) & inside) >= 0.95
        assert iou(made & inside, (classes > 0) & inside) >= 0.95
        for x, y, seen in row["objects"]["keypoints"]:
            assert seen == 2 and made[int(y), int(x)]


def test_both_layouts_write_the_same_labels(scenes: Path, tmp_path: Path) -> None:
    found = {}
    for layout in ("fused", "staged"):
        rows = make(
            scenes,
            tmp_path / layout,
            {"resources.layout": layout, "sampling.strength": 0.4, "variants": 2},
        )
        found[layout] = (digests_of(tmp_path / layout), rows)
    assert found["fused"] == found["staged"]
    assert {row["labels_are"] for row in found["fused"][1]} == {"kept"}


@pytest.mark.parametrize("form", ["parquet", "webdataset", "image-folder"])
def test_every_format_carries_labels(form: str, scenes: Path, tmp_path: Path) -> None:
    dotted = {"output.format": form, "sampling.num_inference_steps": 10}
    tree = {
        "task": "image-to-image",
        "input": {"path": str(scenes), "columns": COLUMNS, "limit": 2},
        "sampling": {"strength": 0.1},
        "output": {"url": str(tmp_path / "out")},
    }
    stream(build(merge(tree, dotted)))
    findings = verify(Ledger(open_store(str(tmp_path / "out"))))
    assert findings.ok, findings.problems


def test_the_background_is_repainted_and_the_objects_stay(scenes: Path, tmp_path: Path) -> None:
    columns = {name: one for name, one in COLUMNS.items() if name != "label_mask"}
    rows = make(
        scenes,
        tmp_path / "out",
        {
            "task": "inpainting",
            "input.columns": columns,
            "sampling.strength": 1.0,
            "conditioning.make": {
                "mask": {"name": "objects-mask", "options": {"invert": 1, "grow": 2}}
            },
            "conditioning.resize": "multiple-of",
        },
    )
    sources = {row["key"]: row for row in labelled_shapes.table().to_pylist()}
    for row in rows:
        source = sources[row["source_key"]]
        assert row["labels_are"] == "kept"
        assert row["objects"]["bbox"] == source["objects"]["bbox"]
        assert row["conditioning"].endswith(
            "mask: objects-mask(boxes=0, category=-1, grow=2, invert=1)"
        )
        before, after = (pixels_of(one["image"]["bytes"]).astype(int) for one in (source, row))
        polygons = [tuple(one) for each in row["objects"]["segmentation"] for one in each]
        inside = drawn(polygons, (after.shape[1], after.shape[0]))
        change = np.abs(before - after)
        assert 2 * change[inside].mean() < change[~inside].mean()


def test_an_object_is_repainted_as_another(scenes: Path, tmp_path: Path) -> None:
    rows = make(
        scenes,
        tmp_path / "out",
        {
            "task": "inpainting",
            "sampling.strength": 1.0,
            "conditioning.make": {
                "mask": {"name": "objects-mask", "options": {"category": 0, "grow": 1}}
            },
        },
    )
    squares = {
        row["key"]: row["objects"]["category"].count(0)
        for row in labelled_shapes.table().to_pylist()
    }
    for row in rows:
        assert row["labels_are"] == "repainted"
        assert row["objects_dropped"] == squares[row["source_key"]] > 0
        assert 0 not in row["objects"]["category"]
        assert (pixels_of(row["label_mask"]["bytes"]) == 255).any()


def test_a_layout_is_drawn_from_objects(scenes: Path, tmp_path: Path) -> None:
    model = BUILDERS["control", "gligen"](tmp_path / "model")
    rows = make(
        scenes,
        tmp_path / "out",
        {
            "task": "control",
            "model.path": str(model),
            "input.columns": {"key": "key", "objects": "objects", **SIZES},
            "input.path": str(with_sizes(scenes, tmp_path / "sized.parquet")),
            "sampling": {"num_inference_steps": 4},
            "conditioning.make": {"regions": "objects-regions"},
        },
    )
    assert {row["labels_are"] for row in rows} == {"requested"}
    assert all(len(row["objects"]["bbox"]) == 2 for row in rows)


SIZES = {"image_width": "image_width", "image_height": "image_height"}


def with_sizes(scenes: Path, path: Path) -> Path:
    """The scenes without images, but with their size."""
    table = pq.read_table(scenes).drop_columns(["image"])
    for name, side in (("image_width", 96), ("image_height", 64)):
        table = table.append_column(name, [[side] * table.num_rows])
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("maker", "part"), [("objects-canvas", "objects"), ("palette", "label_mask")]
)
def test_a_control_image_is_drawn_from_labels(
    maker: str, part: str, scenes: Path, tmp_path: Path
) -> None:
    rows = make(
        scenes,
        tmp_path / "out",
        {
            "task": "control",
            "model.components": {"controlnet": "digits-shapes-canny"},
            "input.path": str(with_sizes(scenes, tmp_path / "sized.parquet")),
            "input.columns": {"key": "key", part: part, **SIZES},
            "sampling": {"num_inference_steps": 2},
            "conditioning.make": {"control": maker},
        },
    )
    assert {row["labels_are"] for row in rows} == {"requested"}


def test_an_enlarged_image_has_enlarged_labels(scenes: Path, tmp_path: Path) -> None:
    family = next(name for task, name in BUILDERS if task == "super-resolution")
    model = BUILDERS["super-resolution", family](tmp_path / "model")
    rows = make(
        scenes,
        tmp_path / "out",
        {
            "task": "super-resolution",
            "model.path": str(model),
            "input.columns.prompt": "prompt",
            "sampling": {"num_inference_steps": 2},
        },
    )
    sources = {row["key"]: row for row in labelled_shapes.table().to_pylist()}
    for row in rows:
        assert row["labels_are"] == "kept"
        xx, xy, x0, yx, yy, y0 = row["fit"]
        assert (xy, yx) == (0, 0)
        mask = pixels_of(row["label_mask"]["bytes"])
        assert mask.shape == (row["height"], row["width"])
        for box in row["objects"]["bbox"]:
            inverse = [(box[0] - x0) / xx, (box[1] - y0) / yy]
            starts = [one[:2] for one in sources[row["source_key"]]["objects"]["bbox"]]
            near = [np.abs(np.subtract(inverse, start)).max() < 1e-3 for start in starts]
            assert any(near) or box[0] == 0 or box[1] == 0
