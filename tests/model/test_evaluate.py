"""`batchgen eval`: what it finds on sets whose answer is known, and what it refuses."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from batchgen.cli import main
from batchgen.curate.evaluate import features
from batchgen.curate.evaluate.leaks import source_prints
from batchgen.curate.evaluate.sets import Origin, find_set, label_text, load_set, pixel_digest
from batchgen.curate.selection import Query, select
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for
from tests.pictured_outputs import jpeg, textures

CLASSES = ("left", "right")
SIDE = 16
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
QUICK = ("--per-class", "2,4", "--draws", "4", "--steps", "20", "--side", str(SIDE))


def drawn(count: int, seed: int, noise: int = 200) -> tuple[list[np.ndarray], list[str]]:
    """Images that are brighter on the side that their label names."""
    rng = np.random.default_rng(seed)
    labels = [CLASSES[number % 2] for number in range(count)]
    pixels = rng.integers(0, noise, (count, SIDE, SIDE, 3)).astype(np.uint8)
    for number, label in enumerate(labels):
        half = SIDE // 2 * CLASSES.index(label)
        pixels[number, :, half : half + SIDE // 2] += 12
    return list(pixels), labels


def write(path: Path, images: list[np.ndarray], labels: list[Any], **columns: Any) -> Path:
    data = []
    for pixels in images:
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        data.append({"bytes": sink.getvalue(), "path": None})
    given = {"key": [f"{path.stem}-{number}" for number in range(len(images))], **columns}
    table = pa.table({**given, "image": pa.array(data, IMAGE), "label": labels})
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real, synthetic, held-out and validation sets, and a tiny network of features."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    place = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIDE,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(place / "vit")
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size).save_pretrained(place / "vit")
    write(place / "real.parquet", *drawn(20, 0))
    write(place / "synthetic.parquet", *drawn(120, 1))
    write(place / "test.parquet", *drawn(100, 2))
    write(place / "val.parquet", *drawn(30, 3))
    write(place / "pool.parquet", *drawn(60, 4))
    return place


def run(folder: Path, *args: str, real: str = "real.parquet", made: str = "") -> Result:
    sets = [str(folder / real), str(folder / (made or "synthetic.parquet"))]
    save = ["--save", str(folder / "saved"), "--features", str(folder / "vit")]
    return CliRunner().invoke(main, ["eval", *sets, *save, *QUICK, *args])


FEW = ("--per-class", "2", "--draws", "2", "--steps", "20")


def facts_of(folder: Path, *args: str, **sets: str) -> dict[str, Any]:
    held_out = ["--held-out", str(folder / "test.parquet")]
    done = run(folder, *held_out, "--json", *args, **sets)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    more = ("--validation", str(folder / "val.parquet"), "--pool", str(folder / "pool.parquet"))
    return facts_of(folder, *more, "--classifier", "cnn,logistic", "--name", "full")


def cells(facts: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    return {
        (one["classifier"], one["per_class"], one["arm"]): one for one in facts["benefit"]["cells"]
    }


def test_images_of_the_same_distribution_help(found: dict[str, Any]) -> None:
    by_place = cells(found)
    assert len(by_place) == 2 * (2 * 5 + 2)
    real, both = by_place["cnn", 2, "real"], by_place["cnn", 2, "real+synthetic"]
    shuffled = by_place["cnn", 2, "real+shuffled"]
    assert both["mean"] > real["mean"] + 0.05
    assert both["mean"] > shuffled["mean"] + 0.05
    assert len(both["accuracies"]) == 4
    assert both["interval"][0] <= both["mean"] <= both["interval"][1]
    primary = [one for one in found["benefit"]["differences"] if one["is_primary"]]
    assert [(one["per_class"], one["arm"], one["against"]) for one in primary] == [
        (2, "real+synthetic", "real+geometric")
    ]
    wins = primary[0]["wins"] + primary[0]["ties"] + primary[0]["losses"]
    assert wins == 4
    paired = np.subtract(both["accuracies"], by_place["cnn", 2, "real+geometric"]["accuracies"])
    assert primary[0]["mean"] == pytest.approx(paired.mean())
    assert both["equivalent"] is not None


def test_the_record_says_what_was_done(found: dict[str, Any], folder: Path) -> None:
    stored = json.loads((folder / "saved" / "full.json").read_text())
    assert stored == found
    assert found["primary_endpoint"].startswith("primary endpoint: accuracy of real+synthetic")
    assert found["hyper_parameters"]["cnn"].keys() == {"2", "4"}
    assert found["sets"]["real"]["classes"] == {"left": 10, "right": 10}
    assert len(found["quality"]["extractor_fingerprint"]) == 64
    text = (folder / "saved" / "full.md").read_text()
    assert text.index("Primary endpoint") < text.index("## Differences")
    page = (folder / "saved" / "full.html").read_text()
    assert "<svg" in page and "src=" not in page and "http" not in page.replace("http-equiv", "")
    names = [one["name"] for one in found["quality"]["overall"]]
    assert names[0].startswith("Fréchet distance, extractor ")
    assert {"KID", "precision", "recall", "density", "coverage", "Vendi score"} <= set(names)


def test_an_evaluation_repeats_by_its_seed(folder: Path) -> None:
    first, again = (facts_of(folder, "--name", name, *FEW) for name in ("one", "two"))
    assert first["benefit"] == again["benefit"] and first["quality"] == again["quality"]
    other = facts_of(folder, "--name", "three", "--seed", "5", *FEW)
    assert other["benefit"]["cells"] != first["benefit"]["cells"]


def test_noise_does_not_help_and_it_is_said_plainly(folder: Path) -> None:
    images, labels = drawn(120, 8)
    rng = np.random.default_rng(0)
    write(folder / "noise.parquet", images, [str(one) for one in rng.permutation(labels)])
    found = facts_of(folder, "--name", "noise", "--draws", "3", made="noise.parquet")
    assert found["helps"] is False
    assert "help:" not in found["verdict"]
    assert found["verdict"].startswith(("No benefit", "The synthetic images do not help"))


def test_the_primary_endpoint_is_printed_before_the_work(folder: Path) -> None:
    done = run(folder, "--held-out", str(folder / "test.parquet"), "--name", "printed", *FEW)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("primary endpoint: accuracy of")
    assert "## Differences" in done.output and "saved: " in done.output


def test_features_are_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--save", str(folder / "kept"))
    first = run(folder, *args, "--json")
    files = sorted((folder / "kept" / features.FOLDER).iterdir())
    assert first.exit_code == 0 and len(files) == 2
    before = [one.stat().st_mtime_ns for one in files]
    calls = []
    original = features._blocks_of
    monkeypatch.setattr(
        features, "_blocks_of", lambda *given: (calls.append(1), original(*given))[1]
    )
    again = run(folder, *args, "--json")
    assert calls == []
    assert [one.stat().st_mtime_ns for one in files] == before
    assert json.loads(again.stdout)["quality"] == json.loads(first.stdout)["quality"]
    files[0].unlink()  # as after a crash between two blocks
    third = run(folder, *args, "--json")
    assert calls == [1] and files[0].exists()
    assert json.loads(third.stdout)["quality"] == json.loads(first.stdout)["quality"]


def test_a_split_column_parts_the_real_set(folder: Path) -> None:
    images, labels = drawn(60, 0)
    splits = ["train"] * 30 + ["validation"] * 10 + ["test"] * 20
    write(folder / "split.parquet", images, labels, split=splits)
    done = run(folder, "--json", "--name", "split", *FEW, real="split.parquet")
    assert done.exit_code == 0, done.output
    sets = json.loads(done.stdout)["sets"]
    assert {name: one["images"] for name, one in sets.items()} == {
        "real": 30,
        "synthetic": 120,
        "held-out": 20,
        "validation": 10,
    }


def test_splits_of_held_out_pool_and_synthetic_sets_are_respected(folder: Path) -> None:
    for name, seed in (("both", 11), ("pool2", 12), ("made", 13)):
        images, labels = drawn(40, seed)
        splits = [*["train"] * 20, *["Testing"] * 12, *["dev"] * 8]
        write(folder / f"{name}.parquet", images, labels, split=splits)
    more = [f"--{name}={folder}/both.parquet" for name in ("held-out", "validation")]
    more += ["--pool", str(folder / "pool2.parquet"), "--json", "--name", "parted", *FEW]
    done = run(folder, *more, made="made.parquet")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert {name: one["images"] for name, one in facts["sets"].items()} == {
        "real": 20,
        "synthetic": 20,
        "held-out": 12,
        "validation": 8,
        "pool": 20,
    }
    assert any("20 of 40 images are used: those of split train." in one for one in facts["notes"])


def test_splits_in_the_names_of_files_part_the_real_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.parquet", *drawn(20, 0))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", *drawn(12, 5))
    done = run(folder, "--json", "--name", "files", *FEW, real=str(tmp_path / "data"))
    assert done.exit_code == 0, done.output
    sets = json.loads(done.stdout)["sets"]
    assert (sets["real"]["images"], sets["held-out"]["images"]) == (20, 12)


def test_an_output_has_the_splits_of_its_input(folder: Path, tmp_path: Path) -> None:
    columns = {"prompt": [f"p{at}" for at in range(8)], "side": list(CLASSES) * 4}
    pq.write_table(pa.table({**columns, "split": ["train", "val"] * 4}), tmp_path / "in.parquet")
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", input__columns__label="side")
    make_output(plan, Ledger(open_store(plan.spec.output.url)))
    with ExitStack() as held:
        found = load_set("real", find_set(str(tmp_path / "out"), held), SIDE)
    assert {one.split("-")[0] for one in found.splits} == {"train", "val"}
    validation = found.of_split("validation", "validation")
    assert validation is not None and len(validation) == len(found) // 2


def test_minus_one_is_no_label() -> None:
    assert label_text(-1, CLASSES) is None
    assert label_text(1, CLASSES) == "right" and label_text(-1, ()) == "-1"


FAULTS = {
    "no labels": ({"label": None}, (), "no column 'label' with labels"),
    "a null label": ({"null": 3}, (), "image real-3 has no label"),
    "a missing class": ({"made": "only left"}, (), "no image of 'right'"),
    "another class": ({"made": "up"}, (), "it has 'up', which the real set"),
    "too few": ({}, ("--per-class", "11"), "10 images of class 'left'; allowed: at most 10"),
    "a leak by pixels": ({"made": "leak"}, (), "with equal pixels (synthetic-0 = test-0)"),
    "a near leak": ({"made": "jpeg"}, (), "as near copies (synthetic-0 = test-0)"),
    "a leak into real": ({"real": "leak"}, (), "are also in the real set"),
    "a leak by key": ({"real": "keys"}, (), "keys of the held-out set"),
    "one draw": ({}, ("--draws", "1"), "--draws: got 1; allowed: 2 to"),
    "no such K": ({}, ("--primary", "9"), "--primary: got 9; allowed: one of --per-class: 2, 4"),
    "another classifier": ({}, ("--classifier", "svm"), "allowed: cnn, logistic"),
    "no numbers": ({}, ("--per-class", "a,b"), "allowed: whole numbers with commas"),
    "another network": ({}, ("--features", "resnet"), "neither a folder"),
    "a bad name": ({}, ("--name", "a/b"), "letters, digits"),
    "no selection": ({}, ("--validation", "real.parquet:bright"), "has no selection"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_named_before_work_starts(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, args, said = FAULTS[what]
    (tmp_path / "vit").symlink_to(folder / "vit")
    images, labels = drawn(20, 0)
    made, made_labels = drawn(40, 1)
    tests, test_labels = drawn(30, 2)
    keys: dict[str, Any] = {}
    if changes.get("made") == "only left":
        made_labels = ["left"] * 40
    if changes.get("made") == "up":
        made_labels[0] = "up"
    if changes.get("made") == "leak":
        made[0] = tests[0]
    if changes.get("made") == "jpeg":
        tests[0] = textures(1, 3)[0]
        made[0] = jpeg(tests[0])
    if changes.get("real") == "leak":
        images[4] = tests[7]
    if changes.get("real") == "keys":
        keys = {"key": ["test-5", *(f"real-{number}" for number in range(19))]}
    real_labels: list[Any] = list(labels)
    if "null" in changes:
        real_labels[changes["null"]] = None
    write(tmp_path / "real.parquet", images, real_labels, **keys)
    if "label" in changes:
        table = pq.read_table(tmp_path / "real.parquet").drop_columns("label")
        pq.write_table(table, tmp_path / "real.parquet")
    write(tmp_path / "synthetic.parquet", made, made_labels)
    write(tmp_path / "test.parquet", tests, test_labels)
    monkeypatch.chdir(tmp_path)
    done = run(tmp_path, "--held-out", "test.parquet", *args)
    assert done.exit_code == 1, done.output
    assert said in " ".join(done.output.split()), done.output
    assert not list((tmp_path).glob("saved/**/*.npy"))


@pytest.fixture(scope="module")
def output(folder: Path) -> Ledger:
    """A finished output with two classes, of images that are made without a model."""
    table = pa.table({"prompt": [f"p{number}" for number in range(24)], "side": list(CLASSES) * 12})
    pq.write_table(table, folder / "prompts.parquet")
    dotted = {"input__columns__label": "side", "output__samples_per_shard": 8}
    plan = plan_for(folder / "prompts.parquet", folder / "out", **dotted)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    return ledger


def test_an_output_and_a_selection_of_it(folder: Path, output: Ledger) -> None:
    select(output, output.require_plan(), "few", Query("variant = 0", 8, "key", ("label",)))
    args = ["eval", str(folder / "real.parquet")]
    more = ["--features", str(folder / "vit"), "--json"]
    whole = CliRunner().invoke(main, [*args, output.store.url, *more])
    assert whole.exit_code == 0, whole.output
    facts = json.loads(whole.stdout)
    assert facts["sets"]["synthetic"]["images"] == 24 and facts["benefit"] is None
    assert "evaluation.json" in output.store.list("_batchgen/evaluations")
    part = CliRunner().invoke(main, [*args, f"{output.store.url}:few", *more, "--name", "few"])
    assert part.exit_code == 0, part.output
    assert json.loads(part.stdout)["sets"]["synthetic"]["images"] == 16
    wrong = CliRunner().invoke(main, [*args, f"{output.store.url}:fex", *more])
    assert wrong.exit_code == 1 and "did you mean 'few'" in wrong.output
    output.withdraw(0)
    undone = CliRunner().invoke(main, [*args, output.store.url, *more])
    assert undone.exit_code == 1 and "1 of 3 shards are pending" in undone.output


def test_a_folder_of_images_is_a_set(folder: Path, tmp_path: Path) -> None:
    images, labels = drawn(16, 9)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "photos" / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    (tmp_path / "photos" / "left" / "bad.png").write_bytes(b"broken")
    sets = [str(tmp_path / "photos"), str(folder / "synthetic.parquet")]
    more = ["--features", str(folder / "vit"), "--save", str(tmp_path / "saved"), "--json"]
    done = CliRunner().invoke(main, ["eval", *sets, *more])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["sets"]["real"]["classes"] == {"left": 8, "right": 8}
    assert any("1 of 17 images cannot be read and are left out" in one for one in facts["notes"])


def made_from(folder: Path, split: list[str] | None = None, **dotted: Any) -> Path:
    """An output of image to image, and its input: 8 images of the held-out set, one unreadable."""
    images, labels = drawn(8, 2)  # those of the held-out set
    columns = {} if split is None else {"split": split}
    write(folder / "in.parquet", images, labels, **columns)
    table = pq.read_table(folder / "in.parquet")
    data = table.column("image").to_pylist()
    data[0]["bytes"] = b"broken"
    place = table.schema.get_field_index("image")
    pq.write_table(table.set_column(place, "image", pa.array(data, IMAGE)), folder / "in.parquet")
    settings = {
        "task": "image-to-image",
        "input__columns__image": "image",
        "input__columns__label": "label",
        "input__columns__key": "key",
        "input__columns__prompt": None,
        "sampling__strength": 0.5,
        **dotted,
    }
    plan = plan_for(folder / "in.parquet", folder / "out", **settings)
    make_output(plan, Ledger(open_store(plan.spec.output.url)))
    return folder / "out"


def test_held_out_images_must_not_be_sources(folder: Path, tmp_path: Path) -> None:
    """Images that were made from held-out ones are refused, by the pixels of the input."""
    made = made_from(tmp_path)
    done = run(folder, "--held-out", str(folder / "test.parquet"), made=str(made))
    assert done.exit_code == 1
    assert "has 7 images of the held-out set" in done.output, done.output


def test_only_rows_that_the_run_read_are_sources(folder: Path, tmp_path: Path) -> None:
    """Those of other splits are not; an unreadable one is named."""
    made = made_from(tmp_path, [*["train"] * 4, *["test"] * 4], input__splits=("train",))
    images, labels = drawn(100, 2)
    write(tmp_path / "test.parquet", images[4:], labels[4:])
    more = ("--held-out", str(tmp_path / "test.parquet"), "--json", *FEW)
    done = run(folder, *more, made=str(made))
    assert done.exit_code == 0, done.output
    (note,) = [one for one in json.loads(done.stdout)["notes"] if "source images" in one]
    assert note.startswith("1 source images in ") and "(in-0: " in note


def test_conditioning_images_are_sources_and_masks_are_not(tmp_path: Path) -> None:
    images, labels = drawn(6, 2)
    write(tmp_path / "in.parquet", images[:2], labels[:2])
    table = pq.read_table(tmp_path / "in.parquet")
    for name, pixels in (("first", images[2:4]), ("second", images[4:]), ("mask", images[4:])):
        other = pq.read_table(write(tmp_path / "other.parquet", pixels, labels[:2]))
        table = table.append_column(name, other.column("image"))
    pq.write_table(table, tmp_path / "in.parquet")
    names = {"control": "first", "control_2": "second", "mask": "mask", "prompt": "label"}
    columns = SimpleNamespace(mapped=lambda: names, split=None)
    given = SimpleNamespace(columns=columns, path=str(tmp_path / "in.parquet"), splits=None)
    plan: Any = SimpleNamespace(spec=SimpleNamespace(input=given))
    origin = Origin("out", lambda: iter(()), None, (plan,))
    ((prints, note),) = source_prints(origin)
    assert prints is not None and not note
    expected = [pixel_digest(one) for one in images[2:]]
    assert [one.tobytes() for one in prints.digests] == expected
