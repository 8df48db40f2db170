"""The sets of a mix: their classes, what shows held-out images, and what made each image."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchgen.curate.copies import Ask, find_copies
from batchgen.curate.image_sets import sources_of
from batchgen.curate.mix import plan_mix
from batchgen.curate.mix_files import record_of, write_mix
from batchgen.curate.mix_set import Mix
from batchgen.curate.mixed import MixedImages
from batchgen.curate.selection import Query, select
from batchgen.errors import InputError
from batchgen.labels.columns import IMAGE
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.datasets_on_disk import plan_for
from tests.pictured_outputs import SIDE, finished, image_set, pictured_output, textures

CLASSES = ["cat", "dog", "emu"]


def made_from(real: Path, output: Path, count: int, **settings: Any) -> Ledger:
    """An image-to-image output of the rows of a set with the columns key, label and seed."""
    columns = {"image": "image", "key": "key", "label": "label", "seed": "seed", "prompt": None}
    plan = plan_for(
        real,
        output,
        task="image-to-image",
        variants=1,
        input__columns={**columns, **settings.pop("columns", {})},
        sampling__width=SIDE,
        sampling__height=SIDE,
        sampling__strength=0.5,
        resources__batch_size=2,
        **settings,
    )
    return finished(plan, textures(count, 50))


def test_all_score_sets_of_copies_count_and_incomplete_ones_are_refused(
    tmp_path: Path,
) -> None:
    made = textures(18, 7)
    ledger = pictured_output(tmp_path, made, {"kind": CLASSES * 6}, input__columns__label="kind")
    for name, number in (("a", 2), ("b", 3)):
        held_out = image_set(tmp_path / f"{name}.parquet", [made[number]])
        find_copies(ledger, Ask(name=name, against=(str(held_out),)))
    real = image_set(tmp_path / "real.parquet", textures(3, 1), label=CLASSES)
    asked = Mix(str(real), (ledger.store.url,))
    left_out = plan_mix(asked).left_out
    assert {one.key.rpartition("-")[0][-2:] for one in left_out} == {"02", "03"}
    scored = tmp_path / "out" / "_batchgen" / "scores" / "b" / "shards"
    next(iter(scored.iterdir())).unlink()
    with pytest.raises(InputError, match=r"score set 'b' of copies has 1 of 2 shards"):
        plan_mix(asked)


def named_set(path: Path, names: dict[str, list[str]], **columns: Any) -> str:
    """A set whose columns have class numbers with names."""
    image_set(path, textures(len(columns["label"]), len(path.name)), **columns)
    features = {name: {"names": one, "_type": "ClassLabel"} for name, one in names.items()}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(told), path)
    return str(path)


def test_classes_keep_the_order_of_the_real_set(tmp_path: Path) -> None:
    names, turned = ["zero", "one", "two"], ["two", "zero", "one"]
    real = named_set(tmp_path / "real.parquet", {"label": names}, label=[0, 1, 2])
    soft = [[0.5, 0.3, 0.2]] * 3
    made = named_set(tmp_path / "made.parquet", {"label": turned}, label=[0, 1, 2], soft=soft)
    plain = image_set(tmp_path / "plain.parquet", textures(3), label=names, soft=soft)
    mix = Mix(real, (made, str(plain)), soft_labels=True, soft_column="soft")
    mixed = plan_mix(mix)
    assert mixed.classes == tuple(names)
    found = {row.set: row.soft for row in mixed.rows}
    assert found["synthetic"] == (0.3, 0.2, 0.5) and found["synthetic-1"] == (0.5, 0.3, 0.2)


def test_class_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    numbers = list(range(11))
    real = image_set(tmp_path / "real.parquet", textures(11), label=pa.array(numbers, pa.float64()))
    soft = np.eye(11).tolist()
    made = image_set(tmp_path / "made.parquet", textures(11, 2), label=numbers, soft=soft)
    mixed = plan_mix(Mix(str(real), (str(made),), soft_labels=True, soft_column="soft"))
    assert mixed.classes == tuple(map(str, numbers))
    assert [row.label for row in mixed.rows if row.soft and row.soft[10] == 1] == ["10", "10"]


def test_class_numbers_with_names_are_read_in_every_column(tmp_path: Path) -> None:
    names = {"label": ["cat", "dog"], "split": ["train", "test"], "source_label": ["cat", "dog"]}
    real = named_set(tmp_path / "real.parquet", names, label=[0, 1, 0, 1], split=[0, 0, 1, 1])
    made = named_set(
        tmp_path / "made.parquet", names, label=[0, 1], source_label=[1, 1], strength=[0.75, 0.5]
    )
    mixed = plan_mix(Mix(real, (made,), soft_labels=True))
    assert [one.key for one in mixed.left_out] == ["real-2", "real-3"]
    assert sorted(row.soft or () for row in mixed.rows[2:]) == [(0.0, 1.0), (0.75, 0.25)]
    plain = image_set(tmp_path / "n.parquet", textures(2), label=["cat", "dog"], split=[0, 1])
    with pytest.raises(InputError, match="column 'split' has the value 0, which names no split"):
        plan_mix(Mix(str(plain), (made,)))


def test_the_key_column_of_a_run_names_its_sources(tmp_path: Path) -> None:
    real = image_set(
        tmp_path / "real.parquet", textures(2), id=["a", "b"], label=["x", "y"], seed=[0, 1]
    )
    ledger = made_from(real, tmp_path / "out", 2, columns={"key": "id"})
    (source,) = sources_of(ledger)
    assert [row.key for row in source.read(False, ())] == ["a", "b"]


def test_samples_made_from_held_out_images_are_left_out(tmp_path: Path) -> None:
    pictures = textures(4, 1)
    real = image_set(tmp_path / "real.parquet", pictures[:2], label=["a", "b"], key=["r0", "r1"])
    keys = ["r0", "r1", "t0", "u1"]
    source = image_set(
        tmp_path / "in.parquet", pictures, key=keys, label=["a", "b"] * 2, seed=[0, 1, 2, 3]
    )
    ledger = made_from(source, tmp_path / "out", 4)
    held_out = image_set(tmp_path / "test.parquet", pictures[2:], key=["t0", "t1"])
    mix = Mix(str(real), (ledger.store.url,), held_out=(str(held_out),))
    said: list[str] = []
    mixed = plan_mix(mix, said.append)
    assert [(one.key, one.reason) for one in mixed.left_out] == [
        ("t0-v0", "made-from-held-out"),
        ("u1-v0", "made-from-held-out"),  # by its pixels
    ]
    assert record_of(mixed, None)["left_out"] == {"made-from-held-out": 2}
    plain = image_set(
        tmp_path / "made.parquet", textures(3, 9), key=["r0-v0", "r1-v0", "t1-v0"], label=[*"abb"]
    )
    mixed = plan_mix(Mix(str(real), (str(plain),), held_out=(str(held_out),)))
    assert [one.key for one in mixed.left_out] == ["t1-v0"]
    source.unlink()
    assert len(plan_mix(mix, said.append).left_out) == 1
    assert any("compared with held-out images only by key" in one for one in said)


def test_a_prompt_with_the_key_of_a_held_out_image_is_not_made_from_it(tmp_path: Path) -> None:
    real = image_set(tmp_path / "real.parquet", textures(2, 1), label=["a", "b"], key=["k0", "k1"])
    made = pictured_output(
        tmp_path,
        textures(2, 9),
        {"kind": ["b", "a"], "key": ["k0", "k1"]},
        input__columns__label="kind",
        input__columns__key="key",
    )
    held_out = image_set(tmp_path / "test.parquet", textures(2, 5), key=["k0", "k1"])
    mixed = plan_mix(Mix(str(real), (made.store.url,), held_out=(str(held_out),)))
    assert not mixed.left_out and not mixed.by_source


def test_held_out_images_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    real = image_set(tmp_path / "real.parquet", textures(2, 1), label=["a", "b"])
    made = image_set(tmp_path / "made.parquet", textures(2, 2), label=["a", "b"], key=["x", "y"])
    held_out = image_set(tmp_path / "test.parquet", textures(20, 3))
    table = pq.read_table(held_out)
    images = table.column("image").to_pylist()
    said: list[str] = []
    for broken in (1, 3):
        images[-broken:] = [{"bytes": b"broken", "path": None}] * broken
        column = pa.array(images, table.schema.field("image").type)
        pq.write_table(table.set_column(1, "image", column), held_out)
        mix = Mix(str(real), (str(made),), held_out=(str(held_out),))
        if broken == 1:
            mixed = plan_mix(mix, said.append)
            assert record_of(mixed, None)["unread_held_out"] == {str(held_out): 1}
            assert any("1 images of" in one and "real-19" in one for one in said)
        else:
            with pytest.raises(InputError, match=r"allowed: a fraction of 0\.1$"):
                plan_mix(mix)


def test_unfinished_outputs_are_refused(tmp_path: Path) -> None:
    real = image_set(tmp_path / "real.parquet", textures(3, 1), label=CLASSES)
    made = pictured_output(
        tmp_path, textures(18, 2), {"kind": CLASSES * 6}, input__columns__label="kind"
    )
    (tmp_path / "out" / "_batchgen" / "shards" / "00001.json").unlink()
    place = made.store.url
    for mix in (
        Mix(str(real), (place,)),
        Mix(place, (str(real),)),
        Mix(str(real), (str(real),), held_out=(place,)),
    ):
        with pytest.raises(InputError, match=r"1 of 2 shards are pending .*then repeat `mix`"):
            plan_mix(mix)


def test_an_image_of_several_sets_is_taken_once(tmp_path: Path) -> None:
    real = image_set(tmp_path / "real.parquet", textures(3, 1), label=CLASSES)
    made = pictured_output(
        tmp_path, textures(18, 2), {"kind": CLASSES * 6}, input__columns__label="kind"
    )
    place = made.store.url
    for name, rows in (("a", "< 'p2'"), ("b", "> 'p15'")):
        select(made, made.require_plan(), name, Query(f"prompt {rows}"))
    parts = (f"{place}:a", f"{place}:b", f"{tmp_path}/./out", str(real))
    mixed = plan_mix(Mix(str(real), parts))
    synthetic = [row.key for row in mixed.rows if row.is_synthetic]
    assert len(synthetic) == len(set(synthetic)) == 18
    assert {one.reason for one in mixed.left_out} == {"in-another-set"}
    with pytest.raises(InputError, match="it names no selection after the colon"):
        plan_mix(Mix(str(real), (f"{place}:",)))


def test_a_key_tells_the_source_only_if_the_run_read_the_real_set(tmp_path: Path) -> None:
    real = image_set(
        tmp_path / "real.parquet", textures(2, 1), label=["a", "b"], key=["1", "2"], seed=[0, 1]
    )
    plain = image_set(
        tmp_path / "p.parquet", textures(2, 4), label=["b", "a"], key=["1-v0", "2-v0"]
    )
    assert not plan_mix(Mix(str(real), (str(plain),))).by_source
    told = image_set(
        tmp_path / "t.parquet", textures(2, 4), label=["b", "b"], image_key=["1", "2"], key=[*"xy"]
    )
    mixed = plan_mix(Mix(str(real), (str(told),), allow_fewer=True))
    assert [row.source_key for row in mixed.rows] == [None, None, None, "2"]
    ledger = made_from(real, tmp_path / "out", 2)
    mixed = plan_mix(Mix(str(real), (ledger.store.url,)))
    assert {row.source_key for row in mixed.rows} == {None, "1", "2"}


def test_images_without_samples_of_their_own_are_replaced_by_their_class(tmp_path: Path) -> None:
    real = image_set(tmp_path / "real.parquet", textures(3, 1), label=[*"aab"], key=["1", "2", "3"])
    made = image_set(
        tmp_path / "made.parquet",
        textures(4, 4),
        label=[*"aaab"],
        image_key=["1", None, None, None],
        key=["x", "y", "z", "w"],
    )
    mixed = plan_mix(Mix(str(real), (str(made),), replace_probability=1.0))
    write_mix(mixed, open_store(str(tmp_path / "mix")))
    images = MixedImages(str(tmp_path / "mix"))
    seen: list[set[str]] = [set(), set(), set()]
    for epoch in range(60):
        images.set_epoch(epoch)
        for number in range(3):
            seen[number].add(images[number]["key"])
    assert seen == [{"x"}, {"x", "y", "z"}, {"w"}]


def test_classes_that_lose_all_images_to_leaks_are_refused(tmp_path: Path) -> None:
    test = textures(3, 9)
    real = image_set(tmp_path / "real.parquet", textures(4, 1), label=["a", "b"] * 2)
    made = image_set(
        tmp_path / "made.parquet", [test[0], *textures(2, 5)], label=[*"abb"], key=[*"xyz"]
    )
    held_out = image_set(tmp_path / "test.parquet", test, key=["t0", "t1", "t2"])
    mix = Mix(str(real), (str(made),), held_out=(str(held_out),))
    with pytest.raises(InputError, match=r"no image of these classes: a; .*1 near-copy"):
        plan_mix(mix)
    assert plan_mix(replace(mix, allow_fewer=True)).only_real == ["a"]


@pytest.mark.parametrize(("ratio", "each"), [(0.25, 1), (0.75, 2), (1.25, 3), (0.2, 0)])
def test_half_an_image_counts_as_one(tmp_path: Path, ratio: float, each: int) -> None:
    real = image_set(tmp_path / "real.parquet", textures(4, 1), label=["a", "b"] * 2)
    made = image_set(
        tmp_path / "made.parquet", textures(6, 2), label=["a", "b"] * 3, key=[*"uvwxyz"]
    )
    mixed = plan_mix(Mix(str(real), (str(made),), ratio=ratio))
    assert sum(row.is_synthetic for row in mixed.rows) == 2 * each
    assert record_of(mixed, None)["only_real"] == ([] if each else ["a", "b"])


def test_rows_with_the_path_of_an_image_are_refused_or_materialised(tmp_path: Path) -> None:
    pictures = textures(2, 1)
    for number, one in enumerate(pictures):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
    names = ["0.png", "1.png"]
    made = image_set(tmp_path / "made.parquet", textures(2, 4), label=["a", "b"], key=["x", "y"])
    paths = pa.array([{"bytes": None, "path": one} for one in names], IMAGE)
    real = tmp_path / "paths.parquet"
    pq.write_table(pa.table({"key": names, "image": paths, "label": ["a", "b"]}), real)
    mixed = plan_mix(Mix(str(real), (str(made),)))
    with pytest.raises(InputError, match=r"row 0 .*has the path of an image"):
        write_mix(mixed, open_store(str(tmp_path / "mix")))
    target = tmp_path / "files"
    write_mix(mixed, open_store(str(target)), "image-folder")
    assert len(list((target / "data").rglob("*.png"))) == 4


@pytest.mark.parametrize(
    ("form", "ending"),
    [("BMP", "png"), ("TIFF", "png"), ("GIF", "png"), ("JPEG", "jpg"), ("WEBP", "webp")],
)
def test_materialised_images_have_formats_of_outputs(
    tmp_path: Path, form: str, ending: str
) -> None:
    real = image_set(tmp_path / "real.parquet", textures(2, 1), label=["a", "b"])
    made = image_set(tmp_path / "made.parquet", textures(2, 4), label=["a", "b"], key=["x", "y"])
    file = io.BytesIO()
    Image.fromarray(textures(1, 8)[0]).save(file, form)
    table = pq.read_table(real)
    images = pa.array([{"bytes": file.getvalue(), "path": None}] * 2, IMAGE)
    pq.write_table(table.set_column(1, "image", images), real)
    target = tmp_path / "files"
    mixed = plan_mix(Mix(str(real), (str(made),)))
    write_mix(mixed, open_store(str(target)), "image-folder")
    files = list((target / "data").rglob(f"real-*.{ending}"))
    assert len(files) == 2
    with Image.open(files[0]) as stored, Image.open(file) as given:
        assert (np.asarray(stored.convert("RGB")) == np.asarray(given.convert("RGB"))).all()
