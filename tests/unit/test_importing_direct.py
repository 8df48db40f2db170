"""Runs read sources that are not Parquet, and take the columns that a file declares."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import yaml

from batchgen.cli import main
from batchgen.cli.direct import prepared
from batchgen.errors import InputError, LimitExceeded, PlanChanged
from batchgen.importing.direct import How, as_parquet, sourced
from batchgen.importing.target import target_at
from batchgen.importing.work import import_source, source_at
from batchgen.output.holdings import refuse_to_remove, remove_output
from batchgen.output.ledger import Ledger
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import open_store
from tests.datasets_on_disk import png, write_prompts

Tree = dict[str, Any]
Said = list[str]


def refuse_nothing(output: str) -> None:
    """The output may be written."""


@pytest.fixture
def how() -> Callable[..., How]:
    said: Said = []

    def make(keep: bool = True, overwrite: bool = False) -> How:
        how = How(keep, overwrite, ExitStack(), said.append, lambda _: None, refuse_nothing)
        vars(make)["said"] = said
        return how

    return make


def tree_of(path: object, output: object, **dotted: object) -> Tree:
    fields = {"input.path": str(path), "output.url": str(output)}
    return merge({}, fields | {name.replace("__", "."): one for name, one in dotted.items()})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(png())
    return tmp_path / "photos"


def test_a_folder_of_photographs_is_the_input_of_a_run(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    out = tmp_path / "out"
    tree = sourced(tree_of(photos, out, task="image-to-image"), how())
    spec = build(tree)
    assert spec.input.path.startswith(f"{out}/_batchgen/input/")
    assert spec.input.columns.mapped() == {"image": "image", "key": "key", "label": "label"}
    assert spec.input.columns.prompt is None
    record = json.loads((Path(spec.input.path).parent / "source.json").read_text())
    assert [name for name, *_ in record["files"]] == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert (record["kind"], record["rows"]) == ("image-folder", 3)


def test_an_unchanged_source_is_not_imported_again(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    first = sourced(tree, how())["input"]["path"]
    before = [one.stat().st_mtime_ns for one in Path(first).iterdir()]
    again = sourced(tree, how())["input"]["path"]
    assert (again, [one.stat().st_mtime_ns for one in Path(again).iterdir()]) == (first, before)
    look = sourced(tree, how(keep=False))["input"]["path"]  # `plan` uses it as well
    assert look == first


def plan_in(out: Path) -> None:
    """Make the output look planned."""
    (out / "_batchgen" / "plan.json").write_text("{}")


def test_a_changed_source_of_a_planned_output_is_refused_by_name(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    out = tmp_path / "out"
    tree = tree_of(photos, out, task="image-to-image")
    old = Path(sourced(tree, how())["input"]["path"])
    plan_in(out)
    (photos / "cat" / "1.png").write_bytes(png(16, 16))
    (photos / "cat" / "2.png").unlink()
    (photos / "dog" / "9.png").write_bytes(png())
    os.utime(photos / "dog" / "1.png", (1, 1))
    with pytest.raises(PlanChanged) as refused:
        sourced(tree, how())
    said = str(refused.value)
    for words in ("cat/1.png has", "cat/2.png is gone", "dog/9.png is new", "dog/1.png was"):
        assert words in said
    assert "--overwrite" in said and str(out) in said
    new = Path(sourced(tree, how(overwrite=True))["input"]["path"])
    assert new != old and new.is_dir() and old.is_dir()  # the run removes the old one


def test_at_most_five_changed_files_are_named(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    sourced(tree, how())
    plan_in(tmp_path / "out")
    for number in range(9):
        (photos / "dog" / f"new{number}.png").write_bytes(png())
    with pytest.raises(PlanChanged, match="and 4 more"):
        sourced(tree, how())


def test_without_a_plan_a_changed_source_replaces_the_import(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    old = Path(sourced(tree, how())["input"]["path"])
    (photos / "dog" / "2.png").write_bytes(png())
    new = Path(sourced(tree, how())["input"]["path"])
    assert new.is_dir() and not old.exists()
    assert [one.name for one in (tmp_path / "out" / "_batchgen" / "input").iterdir()] == [
        new.parent.name
    ]


def test_the_rows_of_recipes_in_the_same_folder_stay(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    sourced(tree, how())
    answers = tmp_path / "out" / "_batchgen" / "input" / "answers.jsonl"
    answers.write_text("{}")
    (photos / "dog" / "2.png").write_bytes(png())
    sourced(tree, how())
    assert answers.exists()


def test_a_recipe_reads_what_was_imported_for_it(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", recipe={"template": "{{ label }}"})
    made = as_parquet(tree, how())
    path = made["input"]["path"]
    assert pq.read_table(path).num_rows == 3 and made["recipe"] == tree["recipe"]
    assert as_parquet(tree, how())["input"]["path"] == path
    other = write_prompts(tmp_path / "a.parquet", 2)
    assert as_parquet(tree_of(other, tmp_path / "out"), how())["input"]["path"] == str(other)
    (tmp_path / "p.csv").write_text("prompt,label\na,x\nb,y\n")
    made = as_parquet(tree_of(tmp_path / "p.csv", tmp_path / "other"), how())
    assert pq.read_table(made["input"]["path"]).num_rows == 2


def test_overwrite_keeps_the_import_that_is_read(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    out = tmp_path / "out"
    tree = tree_of(photos, out, task="image-to-image")
    old = Path(sourced(tree, how())["input"]["path"])
    plan_in(out)
    (photos / "dog" / "2.png").write_bytes(png())
    spec = build(sourced(tree, how(overwrite=True)))
    ledger = Ledger(open_store(str(out)))
    refuse_to_remove(ledger, spec)
    remove_output(ledger, spec.input.path)
    assert Path(spec.input.path).is_dir() and not old.exists()
    assert not (out / "_batchgen" / "plan.json").exists()
    remove_output(ledger)  # nothing is planned, so nothing is known to be ours
    plan_in(out)
    remove_output(ledger)
    assert not Path(spec.input.path).exists()


def test_a_plan_imports_to_a_folder_that_goes_away(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    look = how(keep=False)
    tree = sourced(tree_of(photos, tmp_path / "out", task="image-to-image"), look)
    path = Path(tree["input"]["path"])
    assert path.is_dir() and not (tmp_path / "out").exists()
    assert tree["input"]["uri_roots"] == [str(photos)]  # images are only named
    look.held.close()
    assert not path.exists()


def test_a_killed_import_is_made_again(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    path = Path(sourced(tree, how())["input"]["path"])
    (path.parent / "source.json").unlink()
    next(path.iterdir()).write_bytes(b"half")
    assert sourced(tree, how())["input"]["path"] == str(path)
    assert pq.read_table(path).num_rows == 3


def test_too_many_rejected_rows_stop_before_the_run(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    (photos / "cat" / "1.png").write_bytes(b"x")
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    with pytest.raises(LimitExceeded, match=r"1 of 3 .*33%|1 of 3 .*10%") as error:
        sourced(tree, how())
    assert "cat/1.png" in str(error.value) and "undecodable-image" in str(error.value)
    allowed = merge(tree, {"policy.rejected_limit": 0.5})
    assert pq.read_table(sourced(allowed, how())["input"]["path"]).num_rows == 2


@pytest.mark.parametrize(
    "dotted",
    [{"task": "text-to-imag"}, {"seed": "x"}, {"input__columns__prompt": 5}, {"sampling__eta": 9}],
)
def test_a_wrong_spec_imports_nothing(
    dotted: Tree, photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    tree = tree_of(photos, tmp_path / "out", **{"task": "image-to-image", **dotted})
    assert sourced(tree, how()) == tree
    assert not (tmp_path / "out").exists()


def test_an_output_in_a_store_keeps_the_import(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    url = f"memory://{uuid.uuid4().hex}/out"
    tree = tree_of(photos, url, task="image-to-image")
    first = sourced(tree, how())["input"]["path"]
    assert first.startswith(f"{url}/_batchgen/input/")
    with open_store(first).open("part-00000-of-00001.parquet") as file:
        assert pq.read_table(file).num_rows == 3
    assert sourced(tree, how())["input"]["path"] == first


def test_another_run_that_was_quicker_keeps_its_import(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    """Two runs of one output may generate different shards, and start together."""
    tree = tree_of(photos, tmp_path / "out", task="image-to-image")
    path = Path(sourced(tree, how())["input"]["path"])
    before = [one.stat().st_mtime_ns for one in path.iterdir()]
    target = replace(target_at(str(path)), done="source.json")
    import_source(source_at(str(photos)), target)
    assert [one.stat().st_mtime_ns for one in path.iterdir()] == before


def test_an_output_inside_the_source_is_refused(photos: Path, how: Callable[..., How]) -> None:
    with pytest.raises(InputError, match="inside the input"):
        sourced(tree_of(photos, photos / "out", task="image-to-image"), how())


def test_plain_parquet_is_as_before(tmp_path: Path, how: Callable[..., How]) -> None:
    path = write_prompts(tmp_path / "in" / "a.parquet", 3)
    for given in (path, path.parent, f"{path.parent}/*.parquet", tmp_path / "missing"):
        tree = tree_of(given, tmp_path / "out")
        assert sourced(tree, how()) == tree
    (tmp_path / "in" / "photo.png").write_bytes(png())  # a folder with Parquet files is Parquet
    tree = tree_of(tmp_path / "in", tmp_path / "out")
    assert sourced(tree, how()) == tree


def test_declared_columns_fill_only_what_is_unset_and_used(
    photos: Path, tmp_path: Path, how: Callable[..., How]
) -> None:
    (tmp_path / "p.csv").write_text("prompt,label,strength,seed\na cat,x,0.5,1\n")
    import_source(source_at(str(tmp_path / "p.csv")), target_at(str(tmp_path / "p.parquet")))
    make = how
    tree = sourced(tree_of(tmp_path / "p.parquet", tmp_path / "out"), make())
    columns = tree["input"]["columns"]
    assert columns == {"key": "key", "label": "label", "prompt": "prompt", "seed": "seed"}
    said = vars(make)["said"]
    assert any("key, label, seed, prompt" in line for line in said), said
    given = {"input__columns__label": None, "input__columns__seed": "strength"}
    tree = sourced(tree_of(tmp_path / "p.parquet", tmp_path / "out", **given), make())
    columns = tree["input"]["columns"]
    assert (columns["label"], columns["seed"]) == (None, "strength")


def test_parts_that_are_drawn_from_labels_get_no_column(
    tmp_path: Path, how: Callable[..., How]
) -> None:
    (tmp_path / "in" / "annotations").mkdir(parents=True)
    (tmp_path / "in" / "1.png").write_bytes(png(16, 16))
    coco = {
        "images": [{"id": 1, "file_name": "1.png", "width": 16, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "in" / "annotations" / "a.json").write_text(json.dumps(coco))
    dotted = {"task": "inpainting", "conditioning__make": {"mask": "objects-mask"}}
    spec = build(sourced(tree_of(tmp_path / "in", tmp_path / "out", **dotted), how()))
    mapped = spec.input.columns.mapped()
    assert "mask" not in mapped and mapped["objects"] == "objects"


def test_a_folder_of_no_known_kind_names_the_kinds(tmp_path: Path, how: Callable[..., How]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.xyz").write_text("x")
    with pytest.raises(InputError, match=r"it has no \.parquet file.*image-folder"):
        sourced(tree_of(tmp_path / "in", tmp_path / "out"), how())


@pytest.mark.parametrize("told", ["{", "5", "{}", '{"columns": 5}', '{"columns": {"prompt": []}}'])
def test_metadata_of_another_shape_is_ignored(
    told: str, tmp_path: Path, how: Callable[..., How]
) -> None:
    path = write_prompts(tmp_path / "a.parquet", 2)
    table = pq.read_table(path).replace_schema_metadata({"batchgen": told})
    pq.write_table(table, path)
    tree = tree_of(path, tmp_path / "out")
    assert build(sourced(tree, how())).input.columns.mapped() == {"prompt": "prompt"}


def test_submit_leaves_a_complete_spec_of_a_url_to_the_cluster(
    tmp_path: Path,
) -> None:
    """This machine may have no access to the bucket, so it must not ask."""
    tree = tree_of("s3://nowhere/prompts.csv", tmp_path / "out")
    assert prepared(tree, "submit", {}, ExitStack()) is tree
    (tmp_path / "p.csv").write_text("prompt\na cat\n")
    with click.Context(main), ExitStack() as held:
        made = prepared(tree_of(tmp_path / "p.csv", tmp_path / "out"), "submit", {}, held)
    assert made["input"]["path"].startswith(f"{tmp_path}/out/_batchgen/input/")


# The command line


def batchgen(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_import_says_what_it_did_and_what_to_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "3.png").write_bytes(b"")
    out = tmp_path / "p.parquet"
    words = ("import", photos, out, "--rejected-limit", "0.3")
    code, said, err = batchgen(*words, capsys=capsys)
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert lines[0] == f"{out}: 3 rows from {photos} (image-folder)"
    assert "classes   2: cat 2, dog 1" in lines and "rejected  1" in lines
    assert "  1 null-image, such as: image cat/3.png has zero bytes" in said
    assert f"all of them: {tmp_path}/p-rejects.parquet" in said
    command = f"batchgen run --task image-to-image --input {out} --output out/images"
    assert lines[-1] == f"next      {command}"


def test_import_exits_with_2_above_the_limit_and_keeps_the_rows(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "3.png").write_bytes(b"x")
    code, _, err = batchgen("import", photos, tmp_path / "p.parquet", capsys=capsys)
    assert code == 2 and "25% of the rows were rejected" in err and "--rejected-limit" in err
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 3


def test_import_as_json(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = batchgen("import", photos, tmp_path / "p", "--json", capsys=capsys)
    told = json.loads(out)
    assert (code, err, told["rows"], told["kind"]) == (0, "", 3, "image-folder")


def test_references_are_allowed_in_the_next_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("import", photos, tmp_path / "p.parquet", "--images", "reference")
    _, out, _ = batchgen(*words, capsys=capsys)
    assert f"--set 'input.uri_roots=[{photos}]'" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "o.parquet"], ["nowhere", "no such file"]),
        (["{}", "o.parquet", "--kind", "coc"], ["--kind", "did you mean 'coco'"]),
        (["{}", "o.parquet", "--kind", "coco"], ["no JSON file"]),
        (["{}", "o.parquet", "--kind", "voc"], ["Annotations"]),
        (["{}", "o.parquet", "--kind", "yolo"], ["data.yaml"]),
        (["{}", "o.parquet", "--file-bytes", "many"], ["--file-bytes", "64M"]),
        (["{}", "o.parquet", "--rejected-limit", "2"], ["--rejected-limit"]),
        (["{}", "o.parquet", "--images", "both"], ["--images", "reference"]),
        (["{}", "o.parquet", "--image-root", "nowhere"], ["nowhere"]),
        (["{}", "s3://bucket"], ["bucket"]),
        (["{}", "o.parquet", "--storage-option", "s3.secret=x"], ["secret"]),
    ],
)
def test_import_refuses_wrong_words(
    words: list[str], said: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(photos) for word in words]
    code, _, err = batchgen("import", *filled, capsys=capsys)
    assert code == 1
    assert all(word in err for word in said), err


def test_import_replaces_only_when_asked(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("import", photos, tmp_path / "p.parquet", "--limit", "1")
    assert batchgen(*words, capsys=capsys)[0] == 0
    code, _, err = batchgen(*words, capsys=capsys)
    assert code == 1 and "--overwrite" in err
    assert batchgen(*words, "--overwrite", capsys=capsys)[0] == 0
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 1


def test_plan_of_a_source_shows_the_source(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("plan", "--task", "image-to-image", "--input", photos, "--output", out)
    code, said, err = batchgen(*words, capsys=capsys)
    assert code == 0 and f"3 rows in 1 files of {photos}" in said
    assert "columns as the file declares them: key, label, image" in err
    assert not out.exists()
    code, said, err = batchgen(*words, "--print-spec", capsys=capsys)
    spec = yaml.safe_load(said)
    assert spec["input"]["path"] == str(photos) and spec["input"]["uri_roots"] is None
    code, said, err = batchgen(*words, "--json", capsys=capsys)
    assert "columns" not in err and json.loads(said)["rows"] == 3


def test_a_run_leaves_a_folder_of_others_alone(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    words = ("run", "--task", "image-to-image", "--input", photos, "--output", out)
    code, _, err = batchgen(*words, capsys=capsys)
    assert code == 1 and "thesis.txt" in err
    assert [one.name for one in out.iterdir()] == ["thesis.txt"]
