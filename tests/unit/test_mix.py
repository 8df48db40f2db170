"""Training sets of real and synthetic images: what is chosen, refused, written and read."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from batchgen.cli import main
from batchgen.curate import mix_files
from batchgen.curate.copies import Ask, find_copies
from batchgen.curate.mix import plan_mix
from batchgen.curate.mix_files import write_mix
from batchgen.curate.mix_set import Mix
from batchgen.curate.mixed import MixedImages
from batchgen.curate.selection import Query, select
from batchgen.errors import BatchgenError, InputError, SpecError
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.datasets_on_disk import plan_for
from tests.pictured_outputs import SIDE, finished, image_set, jpeg, pictured_output, textures

REAL, MADE = 6, 24
CLASSES = ["cat", "dog", "emu"]
FORMATS = ("parquet", "image-folder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real set of two images a class, and an output with eight, of which one copies a test."""
    folder = tmp_path_factory.mktemp("mix")
    image_set(folder / "real.parquet", textures(REAL, 1), label=CLASSES * 2)
    made = textures(MADE, 2)
    test = textures(4, 3)
    made[5] = jpeg(test[1])
    image_set(folder / "test.parquet", test, label=["cat"] * 4)
    made_from = [f"real-{number % REAL}" for number in range(MADE)]
    columns = {
        "kind": CLASSES * 8,
        "made_from": made_from,
        "source_label": [CLASSES[number % 2] for number in range(MADE)],
        "site": ["north", "south"] * 12,
    }
    for name in FORMATS:
        settings = {"input__columns__label": "kind", "output__format": name}
        pictured_output(folder, made, columns, name, **settings)
    return folder


def mix_of(folder: Path, **changes: Any) -> Mix:
    asked = Mix(str(folder / "real.parquet"), (str(folder / "parquet"),))
    return replace(asked, **changes)


def write(folder: Path, target: Path, form: str | None = None, **changes: Any) -> Path:
    write_mix(plan_mix(mix_of(folder, **changes)), open_store(str(target)), form)
    return target


def manifest(target: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(target / "manifest.parquet").to_pylist()
    return rows


def run(*words: str) -> Result:
    return CliRunner().invoke(main, [*words])


def test_all_images_by_default_with_their_classes_and_places(folder: Path, tmp_path: Path) -> None:
    rows = manifest(write(folder, tmp_path / "mix"))
    assert len(rows) == REAL + MADE
    assert [row["is_synthetic"] for row in rows] == [False] * REAL + [True] * MADE
    for row in rows:
        table = pq.read_table(row["file"])
        stored = table.slice(row["row"], 1).to_pylist()[0]
        label = stored["label"]
        assert stored["key"] == row["key"] and label == CLASSES[row["label"]]


@pytest.mark.parametrize(
    ("asked", "each"), [({"ratio": 1.5}, 3), ({"ratio": 4.0}, 8), ({"count": 5}, 5)]
)
def test_ratio_and_count_hold_in_each_class(folder: Path, asked: dict[str, Any], each: int) -> None:
    mixed = plan_mix(mix_of(folder, **asked))
    assert mixed.counts()["synthetic"] == dict.fromkeys(CLASSES, each)
    assert mixed.not_drawn == MADE - 3 * each


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows(
    folder: Path, tmp_path: Path
) -> None:
    table = pq.read_table(folder / "real.parquet")
    others = image_set(tmp_path / "a.parquet", textures(12, 4), label=CLASSES * 4)
    turned = pq.read_table(others).take(list(range(11, -1, -1)))
    pq.write_table(turned, tmp_path / "b.parquet")
    pq.write_table(table.take([3, 1, 5, 0, 2, 4]), tmp_path / "real.parquet")
    first = Mix(str(folder / "real.parquet"), (str(others),), count=2)
    again = Mix(str(tmp_path / "real.parquet"), (str(tmp_path / "b.parquet"),), count=2)
    keys = [[row.key for row in plan_mix(one).rows] for one in (first, again)]
    assert keys[0] == keys[1]
    assert keys[0] != [row.key for row in plan_mix(replace(first, seed=1)).rows]


def test_groups_of_another_column(folder: Path) -> None:
    mixed = plan_mix(mix_of(folder, per="site", count=4))
    assert len([row for row in mixed.rows if row.is_synthetic]) == 8
    with pytest.raises(SpecError, match="the real set has no such column"):
        plan_mix(mix_of(folder, per="site", ratio=1.0))


def test_a_selection_of_the_output(folder: Path) -> None:
    ledger = Ledger(open_store(str(folder / "parquet")))
    select(ledger, ledger.require_plan(), "north", Query("site = 'north'"))
    mixed = plan_mix(mix_of(folder, synthetic=(f"{folder / 'parquet'}:north",)))
    assert sum(row.is_synthetic for row in mixed.rows) == MADE // 2
    with pytest.raises(InputError, match=r"has no selection 'nort'.*did you mean 'north'"):
        plan_mix(mix_of(folder, synthetic=(f"{folder / 'parquet'}:nort",)))


def test_near_copies_of_held_out_images_are_left_out_and_listed(
    folder: Path, tmp_path: Path
) -> None:
    target = write(folder, tmp_path / "mix", held_out=(str(folder / "test.parquet"),))
    (left,) = pq.read_table(target / "left-out.parquet").to_pylist()
    assert left["reason"] == "near-copy-of-held-out" and left["key"].endswith("5-v0")
    assert "real-1" in left["message"]
    assert left["key"] not in {row["key"] for row in manifest(target)}
    assert json.loads((target / "mix.json").read_text())["left_out"] == {left["reason"]: 1}


def test_what_copies_found_before_is_respected(folder: Path, tmp_path: Path) -> None:
    made = textures(6, 7)
    image_set(tmp_path / "held.parquet", [made[2]])
    ledger = pictured_output(tmp_path, made, {"kind": CLASSES * 2}, input__columns__label="kind")
    find_copies(ledger, Ask(against=(str(tmp_path / "held.parquet"),)))
    mixed = plan_mix(mix_of(folder, synthetic=(ledger.store.url,)))
    assert [one.reason for one in mixed.left_out] == ["leak-in-copies"]


def test_rows_of_held_out_splits_are_refused_in_every_set(folder: Path, tmp_path: Path) -> None:
    real = image_set(
        tmp_path / "real.parquet",
        textures(5, 1),
        label=["cat", "dog", "cat", "dog", "cat"],
        split=["train", "training", "test", "validation", "val"],
    )
    made = pictured_output(
        tmp_path,
        textures(4, 2),
        {"kind": ["cat", "dog"] * 2, "split": ["train", "train", "test", None]},
        input__columns__label="kind",
    )
    mixed = plan_mix(Mix(str(real), (made.store.url,)))
    assert mixed.counts() == {"real": {"cat": 1, "dog": 1}, "synthetic": {"cat": 1, "dog": 2}}
    assert [one.reason for one in mixed.left_out] == ["held-out-split"] * 4


def test_soft_labels_from_the_class_of_the_source(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mix"
    made = textures(4, 2)
    columns = {
        "kind": ["cat", "dog", "cat", "dog"],
        "source_label": ["cat", "cat", None, "dog"],
        "strength": [0.25, 0.25, 0.25, 1.0],
    }
    real = image_set(tmp_path / "real.parquet", textures(2, 1), label=["cat", "dog"])
    synthetic = image_set(
        tmp_path / "made.parquet",
        made,
        label=columns["kind"],
        source_label=columns["source_label"],
        strength=columns["strength"],
    )
    mix = Mix(str(real), (str(synthetic),), soft_labels=True, gamma=0.5)
    write_mix(plan_mix(mix), open_store(str(target)))
    found = {(row["set"], row["key"]): row["soft_label"] for row in manifest(target)}
    assert found["real", "real-1"] == [0, 1]
    assert found["synthetic", "real-0"] == [1, 0]
    assert found["synthetic", "real-1"] == [0.5, 0.5]  # strength 0.25 to the power 0.5
    assert found["synthetic", "real-2"] == [1, 0]
    with pytest.raises(SpecError, match="no synthetic set says of which class"):
        plan_mix(Mix(str(synthetic), (str(real),), soft_labels=True))


def test_soft_labels_from_a_column_are_checked(folder: Path, tmp_path: Path) -> None:
    real = image_set(tmp_path / "real.parquet", textures(2, 1), label=["cat", "dog"])
    for vector, ok in (([0.3, 0.7], True), ([0.3, 0.6], False), ([1.0], False)):
        made = image_set(
            tmp_path / "made.parquet", textures(2, 2), label=["cat", "dog"], soft=[vector] * 2
        )
        mix = Mix(str(real), (str(made),), soft_labels=True, soft_column="soft")
        if ok:
            assert plan_mix(mix).rows[-1].soft == (0.3, 0.7)
        else:
            with pytest.raises(InputError, match="is no vector of 2 probabilities"):
                plan_mix(mix)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 9.0}, "too few synthetic images: cat has 8 of 18"),
        ({"count": 9}, "cat has 8 of 9"),
        ({"ratio": 1.0, "count": 1}, "--count is set too"),
        ({"ratio": -1.0}, "--ratio: got -1.0"),
        ({"count": 0}, "--count: got 0"),
        ({"replace_probability": 2.0}, "--replace-probability: got 2.0"),
        ({"gamma": 0.0}, "--gamma"),
        ({"weight": 0.0}, "--weight"),
        ({"soft_column": "x"}, "--soft-label-column"),
        ({"per": "sit"}, "--per: got 'sit'.*did you mean 'site'"),
        ({"synthetic": ()}, "--synthetic"),
    ],
)
def test_what_cannot_be_mixed_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BatchgenError, match=said):
        plan_mix(mix_of(folder, **changes))


def test_fewer_are_taken_if_allowed(folder: Path) -> None:
    mixed = plan_mix(mix_of(folder, count=9, allow_fewer=True))
    assert mixed.short == dict.fromkeys(CLASSES, (8, 9))


def test_classes_and_labels_have_to_fit(folder: Path, tmp_path: Path) -> None:
    image_set(tmp_path / "no.parquet", textures(2, 1))
    with pytest.raises(InputError, match=r"real set .* has no column of classes"):
        plan_mix(mix_of(folder, real=str(tmp_path / "no.parquet")))
    image_set(tmp_path / "two.parquet", textures(2, 1), label=["cat", "dog"])
    with pytest.raises(InputError, match="classes that the real set does not have: emu"):
        plan_mix(mix_of(folder, real=str(tmp_path / "two.parquet")))
    image_set(tmp_path / "four.parquet", textures(4, 1), label=[*CLASSES, "fox"])
    with pytest.raises(InputError, match="no image of these classes: fox"):
        plan_mix(mix_of(folder, real=str(tmp_path / "four.parquet")))
    mixed = plan_mix(mix_of(folder, real=str(tmp_path / "four.parquet"), allow_fewer=True))
    assert mixed.classes == (*CLASSES, "fox")
    image_set(tmp_path / "null.parquet", textures(2, 1), label=pa.array([None, None], pa.string()))
    with pytest.raises(InputError, match="none of its rows can be used; left out: 2 no-label"):
        plan_mix(mix_of(folder, real=str(tmp_path / "null.parquet")))
    image_set(tmp_path / "same.parquet", textures(2, 1), label=["cat", "dog"], key=["a", "a"])
    with pytest.raises(InputError, match="two rows have the key a"):
        plan_mix(mix_of(folder, real=str(tmp_path / "same.parquet")))


@pytest.mark.parametrize("form", [None, "parquet", "image-folder", "webdataset"])
@pytest.mark.parametrize("source", FORMATS)
def test_every_reader_gets_the_images_of_the_sets(
    folder: Path, tmp_path: Path, source: str, form: str | None
) -> None:
    target = write(folder, tmp_path / "mix", form, synthetic=(str(folder / source),), count=4)
    images = MixedImages(str(target))
    assert len(images) == REAL + 12 and images.classes == tuple(CLASSES)
    originals = {f"real-{number}": one for number, one in enumerate(textures(REAL, 1))}
    for number in range(REAL):
        one = images[number]
        assert (np.asarray(one["image"]) == originals[one["key"]]).all()
    made = textures(MADE, 2)
    for number in range(REAL, REAL + 12):
        one = images[number]
        place = int(one["key"].removesuffix("-v0").rpartition("-")[2])
        if place != 5:
            assert (np.asarray(one["image"]) == made[place]).all()
        assert one["label"] == place % 3
    if form == "image-folder":
        files = [path for path in (target / "data").rglob("*.png")]
        assert len(files) == REAL + 12
        assert {path.relative_to(target / "data").parts[0] for path in files} == set(CLASSES)
    if form == "parquet":
        (file,) = (target / "data").iterdir()
        table = pq.read_table(file)
        assert table.num_rows == REAL + 12 and table.column("label").type == pa.int64()


def test_a_folder_of_images_is_a_real_set(folder: Path, tmp_path: Path) -> None:
    for number, pixels in enumerate(textures(3, 1)):
        place = tmp_path / "photos" / CLASSES[number]
        place.mkdir(parents=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    target = write(folder, tmp_path / "mix", real=str(tmp_path / "photos"))
    images = MixedImages(str(target))
    assert (np.asarray(images[1]["image"]) == textures(3, 1)[1]).all()
    assert images[1]["label"] == 1


def test_a_real_image_is_replaced_with_the_probability_by_one_of_its_own(
    folder: Path, tmp_path: Path
) -> None:
    target = write(folder, tmp_path / "mix", replace_probability=0.5)
    images = MixedImages(str(target), seed=3)
    assert len(images) == REAL
    rows = manifest(target)
    drawn = []
    for epoch in range(200):
        images.set_epoch(epoch)
        drawn += [(number, images.row_of(number)) for number in range(REAL)]
    replaced = [pair for pair in drawn if rows[pair[1]]["is_synthetic"]]
    assert 0.45 < len(replaced) / len(drawn) < 0.55
    assert all(rows[one]["label"] == rows[other]["label"] for one, other in drawn)
    assert len({other for _, other in replaced}) == MADE
    again = pickle.loads(pickle.dumps(images))
    assert [again.row_of(number) for number in range(REAL)] == [one for _, one in drawn[-REAL:]]
    assert len(MixedImages(str(target), replace_probability=0)) == REAL + MADE
    with pytest.raises(SpecError):
        MixedImages(str(target), replace_probability=2)
    with pytest.raises(IndexError):
        images.row_of(REAL)


def test_images_made_from_the_real_ones_replace_only_these(tmp_path: Path) -> None:
    real = image_set(
        tmp_path / "real.parquet", textures(3, 1), label=["cat", "cat", "dog"], seed=[0, 1, 2]
    )
    columns = {"image": "image", "key": "key", "label": "label", "seed": None, "prompt": None}
    plan = plan_for(
        real,
        tmp_path / "out",
        task="image-to-image",
        variants=1,
        input__columns={**columns, "seed": "seed"},
        sampling__width=SIDE,
        sampling__height=SIDE,
        sampling__strength=0.5,
        resources__batch_size=2,
    )
    finished(plan, textures(3, 5))
    mix = Mix(str(real), (str(tmp_path / "out"),), replace_probability=1.0)
    mixed = plan_mix(mix)
    assert mixed.by_source
    assert [row.source_key for row in sorted(mixed.rows[3:], key=lambda row: row.key)] == [
        "real-0",
        "real-1",
        "real-2",
    ]
    write_mix(mixed, open_store(str(tmp_path / "mix")))
    images = MixedImages(str(tmp_path / "mix"))
    rows = manifest(tmp_path / "mix")
    for number in range(3):
        assert rows[images.row_of(number)]["source_key"] == rows[number]["key"]


def test_the_command_writes_manifest_record_and_card(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mix"
    words = ["mix", str(target), "--real", str(folder / "real.parquet")]
    words += ["--synthetic", str(folder / "parquet"), "--ratio", "2"]
    done = run(*words, "--held-out", str(folder / "test.parquet"))
    assert done.exit_code == 0, done.output
    assert "left out     1 near-copy-of-held-out" in done.output
    card = (target / "README.md").read_text()
    assert "| cat | 2 | 4 |" in card and "licence as given" in card
    assert run(*words).exit_code == 1  # the folder is not empty
    words[1] = str(tmp_path / "other")
    told = json.loads(run(*words, "--json").output)
    assert told["counts"]["synthetic"] == dict.fromkeys(CLASSES, 4)
    words[1] = str(tmp_path / "third")
    assert "allowed: parquet, webdataset, image-folder" in run(*words, "--materialise", "x").output
    assert not (tmp_path / "third").exists()


def test_archives_have_to_be_materialised(folder: Path, tmp_path: Path) -> None:
    ledger = pictured_output(
        tmp_path,
        textures(6, 7),
        {"kind": CLASSES * 2},
        output__format="webdataset",
        input__columns__label="kind",
    )
    with pytest.raises(InputError, match="is an archive, whose images a manifest cannot name"):
        write(folder, tmp_path / "mix", synthetic=(ledger.store.url,))
    target = write(folder, tmp_path / "other", "image-folder", synthetic=(ledger.store.url,))
    assert len(list((target / "data").rglob("*.png"))) == REAL + 6


def test_a_place_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.parquet"):
        MixedImages(str(tmp_path))


@pytest.mark.parametrize("form", [None, "image-folder"])
def test_an_interrupted_mix_says_that_it_is_not_complete(
    form: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = plan_mix(Mix(str(folder / "real.parquet"), (str(folder / "parquet"),)))
    target = open_store(str(tmp_path / "mix"))
    with monkeypatch.context() as patched:
        patched.setattr(mix_files, "card_of", lambda *given: [].pop())
        with pytest.raises(IndexError):
            write_mix(mixed, target, form)
    assert "remove this folder" in target.read("UNFINISHED.txt").decode()
    words = ["mix", target.url, "--real", str(folder / "real.parquet")]
    again = run(*words, "--synthetic", str(folder / "parquet"))
    assert again.exit_code == 1 and "not complete (UNFINISHED.txt)" in again.output
    write_mix(mixed, open_store(str(tmp_path / "other")), form)
    assert not (tmp_path / "other/UNFINISHED.txt").exists()
