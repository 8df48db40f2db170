"""The data files: their columns, the Hugging Face loader, and equal bytes for equal shards."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchgen.images.files import encode_image
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.output import formats
from batchgen.output.commit import commit_shard
from batchgen.output.formats import (
    COLUMNS,
    Finished,
    data_table,
    kept_columns,
    output_schema,
    parquet,
    parquet_bytes,
    rejects_table,
)
from batchgen.output.ledger import Ledger, data_name, rejects_name
from batchgen.output.marker import Counts, Marker
from batchgen.plan.plan import Plan
from batchgen.records import Dropped, ShardRows
from batchgen.shard.prepare import prepare
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import (
    plan_for,
    png,
    prompts,
    spec_for,
    write_columns,
    write_prompts,
    write_table,
)

SCORES = ["pixel_mean", "pixel_std"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def made(path: Path, out: Path, **dotted: Any) -> tuple[Plan, Ledger]:
    """A whole output from a dataset, with arithmetic stages."""
    plan = plan_for(path, out, **dotted)
    ledger = Ledger(open_store(str(out)))
    make_output(plan, ledger)
    return plan, ledger


def loaded(out: Path) -> datasets.Dataset:
    found = datasets.load_dataset(str(out / "data"), split="train", cache_dir=str(out / ".cache"))
    assert isinstance(found, datasets.Dataset)
    return found


def read_data(out: Path, shard: int = 0, shards: int = 1) -> pa.Table:
    return pq.read_table(out / data_name(shard, shards))


def first_rows(plan: Plan) -> ShardRows:
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    (span,) = make_spans(plan, [0])
    return next(read_span(span, plan.spec, columns))


def finished_samples(rows: ShardRows, plan: Plan) -> list[Finished]:
    return [
        Finished(
            sample, f"bytes of {sample.key}".encode(), False, {"pixel_mean": 1.0, "pixel_std": 2.0}
        )
        for sample in prepare(rows, plan).samples
    ]


def written(
    out: Path, plan: Plan, rows: ShardRows, finished: list[Finished], dropped: list[Dropped]
) -> Marker:
    """The marker of a shard that ended so."""
    failed = sum(one.outcome == "failed" for one in dropped)
    marker = Marker(
        shard=rows.shard,
        counts=Counts(len(finished) + len(dropped), len(finished), len(dropped) - failed, failed),
        files=(),
        spec_fingerprint=plan.fingerprints.spec,
        plan_fingerprint=plan.fingerprint,
    )
    accepted, rejects = data_table(plan, rows, finished), parquet_bytes(rejects_table(dropped))
    return commit_shard(Ledger(open_store(str(out))), plan, marker, accepted, rejects)


def test_columns_stand_in_the_documented_order(tmp_path: Path, out: Path) -> None:
    made(write_prompts(tmp_path / "a.parquet", 3), out)
    table = read_data(out)
    assert table.column_names == [*COLUMNS.names, *SCORES, "number"]
    assert table.schema.remove_metadata().field("number").type == pa.int64()
    assert [table.schema.field(name).type for name in COLUMNS.names] == COLUMNS.types


def test_values_tell_how_each_image_was_made(tmp_path: Path, out: Path) -> None:
    path = write_columns(
        tmp_path / "a.parquet", {"prompt": ["a long cat", "dog"], "number": [5, 6]}
    )
    plan, _ = made(path, out, variants=2, sampling__negative_prompt="blur")
    rows = read_data(out).to_pylist()
    assert [row["key"] for row in rows] == [f"a-{r:08d}-v{v}" for r in (0, 1) for v in (0, 1)]
    assert [row["number"] for row in rows] == [5, 5, 6, 6]
    assert [row["prompt_truncated"] for row in rows] == [True, True, False, False]
    first = rows[0]
    expected = {
        "prompt": "a long cat",
        "negative_prompt": "blur",
        "label": None,
        "variant": 0,
        "source_id": "a.parquet#0",
        "task": "text-to-image",
        "model_id": "paper/model",
        "model_revision": "0123456789ab",
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "strength": None,
        "width": 16,
        "height": 8,
    }
    assert {name: first[name] for name in expected} == expected
    assert plan.spec.sampling.width == 16


def test_images_hash_score_and_decode(tmp_path: Path, out: Path) -> None:
    made(write_prompts(tmp_path / "a.parquet", 3), out)
    for row in read_data(out).to_pylist():
        data = row["image"]["bytes"]
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert row["image"]["path"] == f"{row['key']}.png"
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert pixels.shape == (8, 16, 3)
        assert row["pixel_mean"] == pytest.approx(pixels.mean(), abs=1e-3)
        assert row["pixel_std"] == pytest.approx(pixels.std(), abs=1e-3)


@pytest.mark.parametrize(
    ("image_format", "end", "kind"),
    [("png", ".png", "PNG"), ("jpeg", ".jpg", "JPEG"), ("webp", ".webp", "WEBP")],
)
def test_image_formats(image_format: str, end: str, kind: str, tmp_path: Path, out: Path) -> None:
    made(write_prompts(tmp_path / "a.parquet", 1), out, output__image_format=image_format)
    (image,) = read_data(out).column("image").to_pylist()
    assert image["path"].endswith(end)
    assert Image.open(io.BytesIO(image["bytes"])).format == kind


def test_hugging_face_loads_images_and_class_labels(tmp_path: Path, out: Path) -> None:
    source = datasets.Dataset.from_dict(
        {"prompt": ["a cat", "a dog"], "kind": [1, 0], "photo": [png(), png()]},
        features=datasets.Features(
            {
                "prompt": datasets.Value("string"),
                "kind": datasets.ClassLabel(names=["dog", "cat"]),
                "photo": datasets.Image(),
            }
        ),
    )
    source.to_parquet(tmp_path / "a.parquet")
    made(tmp_path / "a.parquet", out, input__columns__label="kind")
    found = loaded(out)
    label = datasets.ClassLabel(names=["dog", "cat"])
    assert (found.features["label"], found.features["kind"]) == (label, label)
    assert isinstance(found.features["photo"], datasets.Image)
    assert found["label"][:] == [1, 0]
    image = found[0]["image"]
    assert (image.size, image.mode) == ((16, 8), "RGB")
    assert found[0]["photo"].size == (8, 8)


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["x", "y"]),
        pa.array([3, 4], pa.int8()),
        pa.array(["x", "y"]).dictionary_encode(),
        pa.array([["x"], ["y", "z"]]),
        pa.array([None, "y"]),
    ],
)
def test_a_label_of_any_type_is_carried(values: pa.Array, tmp_path: Path, out: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["a", "b"], "kind": values})
    made(path, out, input__columns__label="kind")
    assert read_data(out).column("label").to_pylist() == values.to_pylist()
    found = loaded(out)
    assert found["label"][:] == found["kind"][:] == values.to_pylist()


def test_without_a_label_the_column_is_null(tmp_path: Path, out: Path) -> None:
    made(write_prompts(tmp_path / "a.parquet", 2), out)
    assert loaded(out)["label"][:] == [None, None]


def test_an_image_task_keeps_strength_and_not_the_source_image(tmp_path: Path, out: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["a"], "photo": [png()], "n": [1]})
    task: dict[str, Any] = {"task": "image-to-image", "input__columns__image": "photo"}
    made(path, out, **task)
    table = read_data(out)
    assert table.column("strength").to_pylist() == [0.6]
    assert "photo" not in table.column_names
    kept = out.with_name("kept")
    made(path, kept, input__keep_columns=["photo"], **task)
    table = read_data(kept)
    assert table.column("photo").to_pylist() == [png()]
    assert "n" not in table.column_names


@pytest.mark.parametrize(
    ("names", "mapped", "expected"),
    [
        (["prompt", "number"], {}, {"number": "number"}),
        (["prompt", "key"], {}, {"key": "source_key"}),
        (["prompt", "key"], {"key": "key"}, {"key": "source_key"}),
        (["prompt", "width"], {}, {"width": "source_width"}),
        (["prompt", "width"], {"width": "width"}, {}),
        (["prompt", "image"], {}, {"image": "source_image"}),
        (["text", "prompt"], {"prompt": "text"}, {"text": "text", "prompt": "source_prompt"}),
        (
            ["prompt", "key", "source_key"],
            {},
            {"key": "source_key_", "source_key": "source_key"},
        ),
        (
            ["prompt", "source_key", "key", "source_key_"],
            {},
            {"source_key": "source_key", "key": "source_key__", "source_key_": "source_key_"},
        ),
    ],
)
def test_names_that_collide(
    names: list[str], mapped: dict[str, str], expected: dict[str, str]
) -> None:
    spec = spec_for("in", **{f"input__columns__{part}": name for part, name in mapped.items()})
    assert kept_columns(spec, names) == expected
    schema = output_schema(spec, pa.schema([(name, pa.string()) for name in names]))
    assert len(set(schema.names)) == len(schema.names)


def test_columns_that_collide_keep_their_values(tmp_path: Path, out: Path) -> None:
    columns = {"prompt": ["a", "b"], "key": ["x", "y"], "seed": [1.5, 2.5], "sha256": [True, False]}
    made(write_columns(tmp_path / "a.parquet", columns), out)
    table = read_data(out)
    assert table.column("source_key").to_pylist() == ["x", "y"]
    assert table.column("source_seed").to_pylist() == [1.5, 2.5]
    assert table.column("source_sha256").to_pylist() == [True, False]
    assert table.column("key").to_pylist()[0] == "a-00000000-v0"


def test_keep_columns_keeps_those_alone(tmp_path: Path, out: Path) -> None:
    columns = {"prompt": ["a"], "one": [1], "two": [2], "three": [3]}
    path = write_columns(tmp_path / "a.parquet", columns)
    made(path, out, input__keep_columns=["two"])
    assert read_data(out).column_names == [*COLUMNS.names, *SCORES, "two"]
    none = out.with_name("none")
    made(path, none, input__keep_columns=[])
    assert read_data(none).column_names == [*COLUMNS.names, *SCORES]


def test_source_columns_of_nested_types_pass_untouched(tmp_path: Path, out: Path) -> None:
    extra: dict[str, Any] = {
        "tags": [["a", "b"], None],
        "box": [{"x": 1, "y": None}, None],
        "a.b": [1.5, None],
        "image.note": ["dots", "in a name"],
        "blob": [b"\x00\xff", b""],
    }
    made(write_columns(tmp_path / "a.parquet", {"prompt": ["p", "q"], **extra}), out)
    table = read_data(out)
    assert {name: table.column(name).to_pylist() for name in extra} == extra


def test_the_same_shard_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 20, groups=[7, 13])
    digests = []
    for name in ("one", "two"):
        _, ledger = made(path, tmp_path / name, variants=2, output__samples_per_shard=9)
        digests.append([marker.files for marker in ledger.markers(range(5))])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 5


def test_the_order_of_arrival_does_not_show(tmp_path: Path, out: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "a.parquet", 6), out, variants=2)
    rows = first_rows(plan)
    finished = finished_samples(rows, plan)
    dropped = [Dropped(key, "a.parquet#0", 0, "rejected", "r", "m") for key in "ab"]
    one = written(tmp_path / "one", plan, rows, finished, dropped)
    two = written(tmp_path / "two", plan, rows, finished[::-1], dropped[::-1])
    assert one.files == two.files


def test_written_tells_what_is_in_storage(tmp_path: Path, out: Path) -> None:
    plan = plan_for(write_prompts(tmp_path / "a.parquet", 4), out)
    rows = first_rows(plan)
    finished = finished_samples(rows, plan)
    dropped = [Dropped("k", "a.parquet#3", 0, "failed", "non-finite", "NaN")]
    files = written(out, plan, rows, finished[:3], dropped).files
    assert [(file.name, file.rows) for file in files] == [
        ("data/train-00000-of-00001.parquet", 3),
        ("_batchgen/rejects/00000.parquet", 1),
    ]
    for file in files:
        data = (out / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)


def test_rejects_stand_with_their_reasons(tmp_path: Path, out: Path) -> None:
    texts = ["fine", "", None, "flat picture", "broken picture"]
    path = write_columns(tmp_path / "a.parquet", {"prompt": texts})
    _, ledger = made(path, out)
    marker = ledger.marker(0)
    assert marker is not None
    reasons = {"empty-prompt": 1, "null-prompt": 1, "flat-image": 1, "non-finite": 1}
    assert marker.reasons == reasons
    rejects = pq.read_table(out / rejects_name(0)).to_pylist()
    assert [(row["source_id"], row["outcome"], row["reason"]) for row in rejects] == [
        ("a.parquet#1", "rejected", "empty-prompt"),
        ("a.parquet#2", "rejected", "null-prompt"),
        ("a.parquet#3", "rejected", "flat-image"),
        ("a.parquet#4", "failed", "non-finite"),
    ]
    assert all(row["message"] for row in rejects)


def test_without_rejects_there_is_no_rejects_file(tmp_path: Path, out: Path) -> None:
    made(write_prompts(tmp_path / "a.parquet", 2), out)
    assert not (out / "_batchgen/rejects").exists()


def test_a_shard_of_no_accepted_samples_loads(tmp_path: Path, out: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["", "", "cat", "dog"]})
    made(path, out, output__samples_per_shard=2)
    assert read_data(out, 0, 2).num_rows == 0
    assert read_data(out, 0, 2).schema == read_data(out, 1, 2).schema
    found = loaded(out)
    assert found["prompt"][:] == ["cat", "dog"]
    assert found[0]["image"].size == (16, 8)


def test_an_output_of_no_accepted_samples_reads_as_empty(tmp_path: Path, out: Path) -> None:
    """``datasets`` refuses a split without rows in any format; Arrow readers do not."""
    made(write_columns(tmp_path / "a.parquet", {"prompt": ["", ""]}), out)
    found = pyarrow.dataset.dataset(out / "data")
    assert found.count_rows() == 0
    assert found.schema.names == [*COLUMNS.names, *SCORES]


def group_bytes(data: bytes) -> Sequence[int]:
    metadata = pq.read_metadata(io.BytesIO(data))
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def test_row_groups_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 100_000)
    images = [{"bytes": bytes(10_000), "path": "x"} for _ in range(95)]
    data = formats.parquet_bytes(pa.table({"image": pa.array(images, formats.IMAGE)}))
    sizes = group_bytes(data)
    assert len(sizes) >= 9
    assert max(sizes) < 120_000
    assert pq.read_table(io.BytesIO(data)).num_rows == 95


def test_an_image_above_the_bound_has_a_row_group_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1000)
    images = [{"bytes": bytes(5000), "path": "x"} for _ in range(3)]
    data = formats.parquet_bytes(pa.table({"image": pa.array(images, formats.IMAGE)}))
    assert len(group_bytes(data)) == 3


def test_image_bytes_are_stored_as_they_are(tmp_path: Path, out: Path) -> None:
    made(write_prompts(tmp_path / "a.parquet", 2), out)
    metadata = pq.read_metadata(out / data_name(0, 1)).row_group(0)
    columns = [metadata.column(index) for index in range(metadata.num_columns)]
    codecs = {column.path_in_schema: column.compression for column in columns}
    assert codecs["image.bytes"] == "UNCOMPRESSED"
    assert codecs["prompt"] == "ZSTD"
    (image,) = read_data(out).slice(0, 1).column("image").to_pylist()
    assert image["bytes"] in (out / data_name(0, 1)).read_bytes()
    assert not next(c for c in columns if c.path_in_schema == "image.bytes").is_stats_set


def test_the_sources_own_metadata_is_not_copied(tmp_path: Path, out: Path) -> None:
    table = pa.table({"prompt": prompts(1), "n": [1]})
    secret = {"pandas": "{}", "note": "internal", "huggingface": '{"info": {"features": null}}'}
    path = write_table(tmp_path / "a.parquet", table.replace_schema_metadata(secret))
    made(path, out)
    metadata = read_data(out).schema.metadata
    assert set(metadata) == {b"huggingface"}
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}


@pytest.mark.parametrize(
    "metadata",
    [
        b"not JSON",
        b"\xff",
        b"[]",
        b'{"info": "text"}',
        b'{"info": {"features": []}}',
        b'{"info": {"features": {"n": 3}}}',
        b"[" * 100_000,
    ],
)
def test_odd_hugging_face_metadata_of_the_input_is_ignored(
    metadata: bytes, tmp_path: Path, out: Path
) -> None:
    """Every shard failed, although planning had found no problem."""
    table = pa.table({"prompt": prompts(1), "n": [1]})
    table = table.replace_schema_metadata({"huggingface": metadata})
    made(write_table(tmp_path / "a.parquet", table), out)
    features = json.loads(read_data(out).schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}


def test_views_are_stored_as_what_they_view(tmp_path: Path, out: Path) -> None:
    """Arrow cannot take rows from views, so every shard failed."""
    columns = {
        "prompt": pa.array(["a", "b"], pa.string_view()),
        "kind": pa.array(["x", None], pa.string_view()),
        "blob": pa.array([b"\xff", None], pa.binary_view()),
        "words": pa.array([["v"], None], pa.list_view(pa.string_view())),
    }
    path = write_columns(tmp_path / "a.parquet", columns)
    made(path, out, input__columns__label="kind")
    table = read_data(out)
    assert table.column("label").to_pylist() == table.column("kind").to_pylist() == ["x", None]
    assert table.column("words").to_pylist() == [["v"], None]
    kinds = [str(table.schema.field(name).type) for name in ("label", "blob", "words")]
    assert kinds == ["string", "binary", "list<element: string>"]


def test_png_bytes_repeat() -> None:
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    assert encode_image(pixels, "png", 95) == encode_image(pixels.copy(), "png", 95)
