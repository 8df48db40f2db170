"""The sets of a mix: their classes, what shows held-out images, and what made each image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.curate.copies import Ask, find_copies
from batchgen.curate.image_sets import sources_of
from batchgen.curate.mix import plan_mix
from batchgen.curate.mix_set import Mix
from batchgen.errors import InputError
from batchgen.output.ledger import Ledger
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
