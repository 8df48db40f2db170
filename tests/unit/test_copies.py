"""Copies in an output, leaks of held-out images, memorised images: found, stored and selected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from batchgen.cli import main
from batchgen.curate.columns import columns_of
from batchgen.curate.copies import Ask, find_copies
from batchgen.curate.image_sets import set_at
from batchgen.curate.near import Matches, NearVectors
from batchgen.curate.prints import Picture, prints_of
from batchgen.curate.score_sets import store_scores
from batchgen.curate.selection import Query, select, selected_keys
from batchgen.errors import InputError, SpecError
from batchgen.labels.columns import IMAGE
from batchgen.output.ledger import Ledger
from batchgen.stages.scorers.scorer import ScoreColumn
from tests.datasets_on_disk import plan_for
from tests.pictured_outputs import SIDE, finished, image_set, jpeg, pictured_output, png, textures

CLEAN = 24
FORMATS = ("parquet", "webdataset", "image-folder")
Array = np.ndarray[Any, Any]


def crop(pixels: Array) -> Array:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (1, 1, 32, 32)))


def planted() -> list[Array]:
    """24 different images, then copies of the first four: equal, JPEG, darker, cropped."""
    clean = textures(CLEAN)
    dark = (clean[2] * 0.8).astype(np.uint8)
    return [*clean, clean[0], jpeg(clean[1]), dark, crop(clean[3])]


@pytest.fixture(scope="module", params=FORMATS)
def ledger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    folder = tmp_path_factory.mktemp("copies")
    score = {"score": pa.array(range(CLEAN + 4), pa.float64())}
    return pictured_output(folder, planted(), score, output__format=request.param)


def rows_of(ledger: Ledger) -> list[dict[str, Any]]:
    rows = columns_of(ledger).query("select * from samples").to_pylist()
    return sorted(rows, key=lambda row: row["key"])


def run(*words: str) -> Result:
    return CliRunner().invoke(main, [*words])


def test_each_planted_copy_is_found_and_no_clean_image(ledger: Ledger) -> None:
    found = find_copies(ledger, Ask())
    assert (found.samples, found.copies, found.exact, found.groups) == (CLEAN + 4, 4, 1, 4)
    rows = rows_of(ledger)
    assert [row["is_copy"] for row in rows] == [False] * CLEAN + [True] * 4
    for place in range(4):
        first, copy = rows[place], rows[CLEAN + place]
        assert copy["copy_of"] == first["key"] and first["copy_of"] is None
        assert copy["copies_group"] == first["copies_group"] == first["key"]
        assert copy["copies_likeness"] > 0.99 and first["copies_likeness"] is None
    assert rows[CLEAN]["copies_distance"] == 0 and rows[CLEAN]["copies_likeness"] == 1
    assert rows[5]["copies_group"] is None
    select(ledger, ledger.require_plan(), "clean", Query("not is_copy"))
    assert len(selected_keys(ledger, ledger.require_plan(), "clean")) == CLEAN


def test_the_best_of_a_group_stays(ledger: Ledger) -> None:
    find_copies(ledger, Ask(keep_by="score"))
    assert [row["is_copy"] for row in rows_of(ledger)] == [True] * 4 + [False] * CLEAN
    find_copies(ledger, Ask(keep_by="score", lowest=True))
    assert [row["is_copy"] for row in rows_of(ledger)] == [False] * CLEAN + [True] * 4


def test_leaks_and_memorised_images_are_named_with_their_set(
    ledger: Ledger, tmp_path: Path
) -> None:
    clean, other = textures(CLEAN), textures(30, seed=9)
    test = image_set(tmp_path / "test.parquet", [*other, jpeg(clean[7]), clean[8]])
    folder = tmp_path / "more"
    folder.mkdir()
    Image.fromarray(clean[9]).resize((100, 100), Image.Resampling.BICUBIC).save(folder / "a.jpg")
    training = image_set(tmp_path / "train.parquet", [*other[:5], clean[10]])
    ask = Ask(against=(str(test), str(folder)), training=str(training))
    found = find_copies(ledger, ask)
    told = [(one.kind, one.images, one.found, one.exact) for one in found.compared]
    assert told == [("leak", 32, 2, 1), ("leak", 1, 1, 0), ("memorised", 6, 1, 1)]
    rows = rows_of(ledger)
    leaks = {at: (row["leak"], row["leak_set"]) for at, row in enumerate(rows) if row["is_leak"]}
    assert leaks == {
        7: ("real-30", str(test)),
        8: ("real-31", str(test)),
        9: ("a", str(folder)),
    }
    assert [at for at, row in enumerate(rows) if row["is_memorised"]] == [10]
    assert rows[10]["memorised"] == "real-5" and rows[10]["memorised_distance"] == 0
    assert set(found.calibration) == {"0%", "1%", "5%", "50%"}
    select(ledger, ledger.require_plan(), "all", Query("not is_copy and not is_leak"))


def test_only_held_out_rows_of_a_set_with_splits_count(ledger: Ledger, tmp_path: Path) -> None:
    clean = textures(CLEAN)
    splits = ["train", "test", "val", "training"]
    path = image_set(tmp_path / "all.parquet", clean[4:8], split=splits)
    (told,) = find_copies(ledger, Ask(against=(str(path),))).compared
    assert (told.images, told.left_out, told.found) == (2, 2, 2)
    assert [at for at, row in enumerate(rows_of(ledger)) if row["is_leak"]] == [5, 6]
    (told,) = find_copies(ledger, Ask(training=str(path))).compared
    assert (told.images, told.left_out, told.found) == (2, 2, 2)
    assert [at for at, row in enumerate(rows_of(ledger)) if row["is_memorised"]] == [4, 7]


def test_an_output_is_a_set_as_well(ledger: Ledger, tmp_path: Path) -> None:
    clean = textures(CLEAN)
    other = pictured_output(tmp_path, [*textures(3, seed=5), clean[11]])
    (told,) = find_copies(ledger, Ask(against=(other.store.url,))).compared
    assert (told.images, told.found, told.exact) == (4, 1, 1)


def test_the_sources_of_the_run(tmp_path: Path) -> None:
    clean = textures(6)
    image_set(tmp_path / "sources.parquet", clean, seed=list(range(6)))
    made = [clean[0], *textures(4, seed=8), jpeg(clean[5])]
    plan = plan_for(
        tmp_path / "sources.parquet",
        tmp_path / "out",
        task="image-to-image",
        input__columns={"image": "image", "key": "key", "seed": "seed", "prompt": None},
        sampling__width=SIDE,
        sampling__height=SIDE,
        sampling__strength=0.5,
        resources__batch_size=2,
    )
    ledger = finished(plan, made)
    (told,) = find_copies(ledger, Ask(against=("input",))).compared
    assert (told.kind, told.images, told.found, told.exact) == ("source_copy", 6, 2, 1)
    rows = rows_of(ledger)
    found = [(row["source_id"], row["source_copy"]) for row in rows if row["is_source_copy"]]
    assert [one[1] for one in found] == ["real-0", "real-5"]


def test_a_run_that_read_no_images_has_no_input_to_compare_with(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="read no images"):
        find_copies(ledger, Ask(against=("input",)))


def test_mirrored_images_are_copies_if_asked(tmp_path: Path) -> None:
    clean = textures(5)
    ledger = pictured_output(tmp_path, [*clean, clean[2][:, ::-1].copy()])
    assert find_copies(ledger, Ask()).copies == 0
    assert find_copies(ledger, Ask(mirrored=True)).copies == 1
    assert rows_of(ledger)[5]["is_copy"]


def test_unreadable_images_are_counted_and_named(ledger: Ledger, tmp_path: Path) -> None:
    images = [{"bytes": png(one), "path": None} for one in textures(9, seed=3)]
    images.append({"bytes": b"no image", "path": None})
    path = image_set(tmp_path / "held.parquet", textures(10, seed=3))
    table = pq.read_table(path)
    place = table.schema.get_field_index("image")
    pq.write_table(table.set_column(place, "image", pa.array(images, IMAGE)), path)
    (told,) = find_copies(ledger, Ask(against=(str(path),))).compared
    assert told.images == 9 and told.unread == {"undecodable-image": 1}
    assert told.examples[0][0] == "real-9"
    with pytest.raises(InputError, match=r"1 of 10 images cannot be read \(real-9: .*limit"):
        find_copies(ledger, Ask(against=(str(path),), bad_limit=0.05))


def test_embeddings_are_compared_if_asked(tmp_path: Path) -> None:
    ledger = pictured_output(tmp_path, textures(20))
    keys = [row["key"] for row in rows_of(ledger)]
    vectors = np.random.default_rng(0).normal(size=(20, 8))
    vectors[13] = vectors[4] + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kind = pa.list_(pa.float16(), 8)
    rows = [list(one) for one in vectors.astype(np.float16)]
    table = pa.table({"key": keys, "embedding": pa.array(rows, kind)})
    column = ScoreColumn("embedding", kind, "made up")
    store_scores(ledger, "vectors", table, [column], "made up")
    found = find_copies(ledger, Ask())
    assert found.copies == 0 and "--similarity" in found.notes[0]
    for approximate in (False, True):
        found = find_copies(ledger, Ask(similarity=0.99, approximate=approximate))
        assert found.copies == 1 and not found.notes
        row = rows_of(ledger)[13]
        assert row["copy_of"] == keys[4] and row["copies_distance"] is None
        assert row["copies_likeness"] > 0.99


def test_pairs_that_the_index_misses_once_are_still_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is asked twice: which samples stay, and which of them each copy is nearest to."""
    ledger = pictured_output(tmp_path, textures(6))
    vectors = np.eye(6, 8, dtype=np.float32)
    vectors[5] = vectors[2]

    class Missing(NearVectors):
        def __call__(self, first: Array, second: Array) -> Iterator[Matches]:
            yield from super().__call__(first, second) if first is second else ()

    def near(ledger: Ledger, keys: object, least: float, approximate: bool) -> NearVectors:
        return (Missing if approximate else NearVectors)(vectors, vectors, least)

    monkeypatch.setattr("batchgen.curate.copies.vectors_near", near)
    found = find_copies(ledger, Ask(similarity=0.9, approximate=True))
    rows = rows_of(ledger)
    assert found.copies == 1 and [row["is_copy"] for row in rows] == [False] * 5 + [True]
    assert rows[5]["copy_of"] == rows[2]["key"]


def test_outputs_that_are_not_finished_are_told(tmp_path: Path) -> None:
    ledger = pictured_output(tmp_path, textures(20))
    other = pictured_output(tmp_path, textures(20, 1), name="other")
    for name in ("out", "other"):
        (tmp_path / name / "_batchgen" / "shards" / "00001.json").unlink()
    found = find_copies(Ledger(ledger.store), Ask(against=(other.store.url,)))
    assert found.samples == 16 and len(found.notes) == 2
    assert all("is not finished: 1 of 2 shards were read" in note for note in found.notes)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (Ask(distance=17), "--distance: got 17; allowed: 0 to 16"),
        (Ask(likeness=0), "--likeness: got 0"),
        (Ask(similarity=1.5), "--similarity: got 1.5"),
        (Ask(lowest=True), "--lowest"),
        (Ask(approximate=True), "--approximate"),
        (Ask(name="a/b"), "--name"),
    ],
)
def test_wrong_settings_are_refused_before_work(ledger: Ledger, ask: Ask, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        find_copies(ledger, ask)


def test_faults_of_sets_and_columns(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_copies(ledger, Ask(against=(str(tmp_path / "none"),)))
    with pytest.raises(SpecError, match=r"--keep-by: got 'scor'.*did you mean 'score'"):
        find_copies(ledger, Ask(keep_by="scor"))
    with pytest.raises(InputError, match="--keep-by prompt: the column has no numbers"):
        find_copies(ledger, Ask(keep_by="prompt"))
    with pytest.raises(InputError, match="has no column embedding"):
        find_copies(ledger, Ask(similarity=0.9))
    (tmp_path / "texts.csv").write_text("prompt\na\n")
    with pytest.raises(InputError, match="it has no images"):
        set_at(str(tmp_path / "texts.csv"))
    with pytest.raises(InputError, match="it has no images"):
        prints_of(iter(list[Picture]()), "nothing")


def test_the_command_and_its_exit_codes(ledger: Ledger, tmp_path: Path) -> None:
    url, clean = ledger.store.url, textures(CLEAN)
    test = str(image_set(tmp_path / "test.parquet", [clean[6]]))
    done = run("copies", url, "--against", test, "--fail-on", "leaks")
    assert done.exit_code == 2
    assert "copies     4, of 4 samples that stay; 1 with equal pixels" in done.output
    assert "leaks      1 samples are copies of held-out images, 1 with equal pixels" in done.output
    assert 'not is_copy and not is_leak"' in done.output
    done = run("copies", url, "--json", "--fail-on", "leaks", "--fail-on", "memorised")
    assert done.exit_code == 0
    assert json.loads(done.output)["copies"] == 4
    assert run("copies", url, "--fail-on", "copies").exit_code == 2
    assert run("copies", url, "--distance", "99").exit_code == 1
    assert run("copies", str(tmp_path / "nothing")).exit_code == 1
