"""Recipes from the command line, in a job, and by name."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from batchgen.cli import main
from batchgen.cli.recipes import _Job, images_tree
from batchgen.errors import LimitExceeded, SpecError
from batchgen.recipes import presets
from batchgen.recipes.expand import expand, preview
from batchgen.recipes.job import expanded
from batchgen.recipes.recipe import build_recipe
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import open_store
from tests.unit.test_recipes_expand import write_photos

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def batchgen(*words: object, capsys: Capture) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return write_photos(tmp_path / "in" / "photos.parquet")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    tree = {
        "seed": 3,
        "from": ["cat", "dog"],
        "variants": 4,
        "templates": {"plain": "a {{ name }}", "big": "a {big|huge} {{ name }}"},
        "fields": {"guidance_scale": {"uniform": [1.5, 3.0]}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_expand_writes_rows_and_says_where(
    recipe_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "rows.parquet"
    code, out, _ = batchgen("expand", recipe_file, "--output", target, capsys=capsys)
    assert code == 0 and f"8 samples of 2 rows: {target}" in out
    code, out, _ = batchgen(
        "expand", recipe_file, "--output", tmp_path / "b.parquet", "--json", capsys=capsys
    )
    assert json.loads(out)["samples"] == 8
    assert pq.read_table(target).equals(pq.read_table(tmp_path / "b.parquet"))


def test_variants_limit_and_seed(recipe_file: Path, tmp_path: Path, capsys: Capture) -> None:
    everything, part = tmp_path / "all.parquet", tmp_path / "part.parquet"
    batchgen("expand", recipe_file, "--output", everything, capsys=capsys)
    flags = ["--variants", "3:4", "--output", part]
    assert batchgen("expand", recipe_file, *flags, capsys=capsys)[0] == 0
    rows = {row["key"]: row for row in pq.read_table(everything).to_pylist()}
    later = pq.read_table(part).to_pylist()
    assert [row["key"] for row in later] == ["cat-v3", "dog-v3"]
    assert all(rows[row["key"]] == row for row in later)
    batchgen("expand", recipe_file, "--limit", 3, "--output", part, capsys=capsys)
    assert pq.read_table(part).to_pylist() == list(rows.values())[:3]
    batchgen("expand", recipe_file, "--seed", 4, "--output", part, capsys=capsys)
    other = pq.read_table(part).column("guidance_scale").to_pylist()
    assert other != [row["guidance_scale"] for row in rows.values()]


def test_preview_shows_rows_and_writes_nothing(
    recipe_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = batchgen("expand", recipe_file, "--preview", 3, capsys=capsys)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4
    assert lines[0].split() == ["key", "variant", "guidance_scale", "template", "prompt"]
    assert lines[1].startswith("cat-v0") and " cat" in lines[1]
    code, out, _ = batchgen("expand", recipe_file, "--preview", "--json", capsys=capsys)
    assert len(json.loads(out)) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["expand"], "a recipe is needed"),
        (["expand", "nowhere.yaml", "--output", "x.parquet"], "nowhere.yaml"),
        (["expand", "{}"], "--output: got nothing"),
        (["expand", "{}", "--output", "x.parquet", "--images"], "--images"),
        (["expand", "{}", "--output", "x.parquet", "--variants", "4:2"], "variants: got '4:2'"),
        (["expand", "--preset", "da-fuson", "--output", "x"], "did you mean 'da-fusion'"),
        (["presets", "none"], "da-fusion"),
    ],
)
def test_usage_errors_exit_1(
    words: list[str], said: str, recipe_file: Path, capsys: Capture
) -> None:
    code, _, err = batchgen(*(word.format(recipe_file) for word in words), capsys=capsys)
    assert code == 1 and said in err and "Traceback" not in err


def test_too_many_rejected_samples_exit_2(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"key": str(n), "text": "x" if n else None} for n in range(4)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"from": rows, "templates": "{{ text }}"}))
    flags = ["--output", tmp_path / "rows.parquet"]
    code, out, _ = batchgen("expand", recipe, *flags, capsys=capsys)
    assert code == 2 and "1 undefined-variable" in out and "rows-rejects.parquet" in out
    assert batchgen("expand", recipe, *flags, "--rejected-limit", 0.25, capsys=capsys)[0] == 0


def job(photos: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    recipe = {
        "from": str(photos),
        "variants": 2,
        "templates": "a {{ class.name }}",
        "fields": {"strength": {"uniform": [0.3, 0.8], "step": 0.1}, "lora": ""},
    }
    tree = {"task": "image-to-image", "recipe": recipe, "output": {"url": str(tmp_path / "out")}}
    return merge(tree, changes)


def test_the_recipe_of_a_job_becomes_its_input(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "_batchgen" / "input"
    tree = expanded(job(photos, tmp_path, seed=9), str(folder))
    assert "recipe" not in tree
    spec = build(tree)
    assert spec.seed == 9
    columns = spec.input.columns
    assert (columns.prompt, columns.image, columns.strength) == ("prompt", "image", "strength")
    assert (columns.key, columns.label, columns.lora) == ("key", "label", "lora")
    assert spec.input.path.startswith(str(folder))
    assert spec.input.uri_roots == (str(photos.parent), str(folder))
    assert pq.read_metadata(spec.input.path).num_rows == 24
    (text,) = folder.glob("recipe-*.yaml")
    assert build_recipe(yaml.safe_load(text.read_text())).seed == 9
    assert len(list(folder.iterdir())) == 2


def test_a_repeated_expansion_keeps_the_rows_and_another_recipe_writes_others(
    photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "input"
    first = expanded(job(photos, tmp_path), str(folder))["input"]["path"]
    written = Path(first).stat().st_mtime_ns
    again = expanded(job(photos, tmp_path), str(folder))["input"]["path"]
    assert again == first and Path(first).stat().st_mtime_ns == written
    other = expanded(job(photos, tmp_path, seed=2), str(folder))["input"]["path"]
    assert other != first and Path(first).exists()
    write_photos(photos, 15)
    assert expanded(job(photos, tmp_path), str(folder))["input"]["path"] not in (first, other)


def test_the_spec_says_rows_variants_and_columns(photos: Path, tmp_path: Path) -> None:
    tree = job(photos, tmp_path, variants=3)
    tree["recipe"].pop("from")
    columns = {"image": None, "label": "label", "strength": None}
    tree = merge(tree, {"input.path": str(photos), "input.columns": columns, "input.limit": 5})
    made = expanded(tree, str(tmp_path / "input"))
    assert "variants" not in made and made["input"]["limit"] == 5
    assert made["input"]["columns"]["image"] is None
    assert made["input"]["columns"]["strength"] is None
    assert pq.read_metadata(made["input"]["path"]).num_rows == 36


def test_a_tree_without_recipe_is_as_it_was(tmp_path: Path) -> None:
    tree = {"input": "x.parquet", "output": str(tmp_path)}
    assert expanded(tree, str(tmp_path / "input")) == tree
    assert list(tmp_path.iterdir()) == []


def test_a_job_with_two_sources_or_too_many_rejects_stops(photos: Path, tmp_path: Path) -> None:
    both = job(photos, tmp_path, **{"input.path": str(photos)})
    with pytest.raises(SpecError, match="remove one of the two"):
        expanded(both, str(tmp_path / "input"))
    bad = job(
        photos, tmp_path, **{"recipe.templates": "{% if key != 'photo-1' %}{{ x }}{% endif %}y"}
    )
    with pytest.raises(LimitExceeded, match="22 of 24 samples were rejected"):
        expanded(bad, str(tmp_path / "input"))
    with pytest.raises(SpecError, match="recipe"):
        expanded(job(photos, tmp_path) | {"recipe": [1]}, str(tmp_path / "input"))


def test_a_recipe_file_and_a_preset_in_a_spec(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"preset": "da-fusion", "from": str(photos), "variants": 2}))
    tree = job(photos, tmp_path) | {"recipe": str(path)}
    table = pq.read_table(expanded(tree, str(tmp_path / "input"))["input"]["path"])
    assert table.num_rows == 24
    assert set(table.column("guidance_scale").to_pylist()) <= {1.5, 2.0, 2.5}


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_makes_rows_and_a_job(name: str, photos: Path, tmp_path: Path) -> None:
    recipe = build_recipe(presets.with_recipe(name, {"from": str(photos)}))
    table, _ = preview(recipe, 16)
    assert table.num_rows == 16 and "prompt" in table.column_names
    guidance = table.column("guidance_scale").to_pylist()
    usual = {4.0} if name == "diffusemix" else {1.5, 2.0, 2.5}
    assert set(guidance) <= usual
    given = {"preset": name, "input.path": str(photos), "output.url": str(tmp_path / "out")}
    tree = expanded(presets.with_preset(merge({}, given)), str(tmp_path / "input"))
    spec = build(tree)
    assert spec.task == presets.preset(name).spec["task"]
    assert spec.input.columns.prompt == "prompt"


def test_what_a_spec_has_wins_over_its_preset() -> None:
    given = {"preset": "genie", "recipe": {"fields": {"strength": 0.8}, "templates": "x"}}
    tree = presets.with_preset({**given, "task": "inpainting"})
    assert tree["task"] == "inpainting"
    assert tree["recipe"]["fields"]["strength"] == 0.8
    assert tree["recipe"]["fields"]["guidance_scale"] == {"choice": [1.5, 2.0, 2.5]}
    assert tree["recipe"]["templates"] == "x" and tree["recipe"]["pair"]["with"] == "other"
    with pytest.raises(SpecError, match="did you mean 'genie'"):
        presets.with_preset({"preset": "gennie"})


def test_the_page_of_presets_is_that_of_the_files() -> None:
    """`python -c "from batchgen.recipes import presets; print(presets.page())"` makes it."""
    page = (ROOT / "docs" / "presets.md").read_text()
    assert presets.table() in page
    for name in presets.names():
        assert presets.section(name) in page


def test_presets_are_listed_and_printed(capsys: Capture) -> None:
    code, out, _ = batchgen("presets", capsys=capsys)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(presets.names())
    code, out, _ = batchgen("presets", "genie", capsys=capsys)
    assert code == 0 and yaml.safe_load(out)["recipe"]["pair"] == {
        "with": "other",
        "label": "target",
    }


def test_a_preset_by_flag_plans_a_job(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--preset", "real-guidance", "--input", photos, "--output", tmp_path / "out"]
    code, out, err = batchgen("plan", *words, "--variants", 2, "--json", capsys=capsys)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["rows"] == 24 and plan["spec"]["task"] == "image-to-image"
    assert plan["spec"]["input"]["columns"]["strength"] == "strength"
    code, _, err = batchgen("plan", *words, "--variants", 2, capsys=capsys)
    assert "recipe: 24 samples of 12 rows" in err
    assert not (tmp_path / "out").exists()


def test_a_preset_needs_an_output_that_is_its_own(
    photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["plan", "--preset", "genie", "--input", photos]
    code, _, err = batchgen(*words, capsys=capsys)
    assert code == 1 and "output: got nothing" in err and "--output" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    words[0] = "run"
    code, _, err = batchgen(*words, "--output", tmp_path / "mine", capsys=capsys)
    assert code == 1 and "thesis.txt" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_variants_of_a_balanced_recipe_are_chosen_by_range(
    photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    balance = {"column": "label", "target": 10}
    tree = {"from": str(photos), "templates": "{{ class.name }}", "balance": balance}
    recipe.write_text(yaml.safe_dump(tree))
    target = tmp_path / "rows.parquet"
    code, _, err = batchgen(
        "expand", recipe, "--variants", "2:3", "--output", target, capsys=capsys
    )
    assert code == 0, err
    assert set(pq.read_table(target).column("variant").to_pylist()) == {2}


def test_the_output_must_not_be_what_is_read(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"from": str(photos.parent), "templates": "a"}))
    before = photos.read_bytes()
    for target in (photos, photos.parent / "rows.parquet"):
        code, _, err = batchgen("expand", recipe, "--output", target, capsys=capsys)
        assert code == 1 and "which the recipe reads" in err
    assert photos.read_bytes() == before
    code, _, err = batchgen("expand", recipe, "--output", tmp_path / "rows", capsys=capsys)
    assert code == 1 and "ends in .parquet" in err


def test_the_images_of_a_preview_are_a_job_of_its_rows(photos: Path, tmp_path: Path) -> None:
    recipe = build_recipe(presets.with_recipe("genie", {"from": str(photos)}))
    table, _ = preview(recipe, 4)
    rows = str(tmp_path / "rows.parquet")
    pq.write_table(table, rows)
    spec = build(images_tree(recipe, table, _Job("genie", None, None, None), rows))
    assert (spec.task, spec.input.path) == ("image-to-image", rows)
    assert spec.output.url == str(tmp_path / "images")
    assert spec.input.uri_roots == (str(photos.parent), str(tmp_path))
    plain = build_recipe({"from": ["cat"], "templates": "a {{ name }}"})
    table, _ = preview(plain, 1)
    spec = build(images_tree(plain, table, _Job(None, None, "my/model", "out"), rows))
    assert (spec.task, spec.model.path) == ("text-to-image", "my/model")


def test_a_rejected_expansion_stays_rejected(photos: Path, tmp_path: Path) -> None:
    bad = job(photos, tmp_path, **{"recipe.templates": "{{ x }}{{ key }}"})
    bad["recipe"]["templates"] = "{% if key != 'photo-1' %}{{ x }}{% endif %}y"
    for _ in range(2):
        with pytest.raises(LimitExceeded):
            expanded(bad, str(tmp_path / "input"))


def test_rows_go_to_a_store_and_come_from_one(tmp_path: Path) -> None:
    """The same on a store without folders and renames; fsspec's memory stands for it."""
    source = open_store("memory://recipes/in")
    source.put(
        "photos.parquet", write_photos(tmp_path / "photos.parquet", by_path=True).read_bytes()
    )
    asked: list[str] = []

    def answer(question: Any, number: int) -> str:
        asked.append(question.prompt)
        return f"{question.prompt} {number}"

    recipe = build_recipe(
        {
            "from": "memory://recipes/in/photos.parquet",
            "templates": "{{ scene }}{{ 1 / (0 if key == 'photo-3' else 1) }}",
            "fields": {"scene": {"ask": {"prompt": "{{ class.name }}", "with": {"function": "f"}}}},
        }
    )
    target = "memory://recipes/out/rows.parquet"
    made = expand(recipe, target, answers_path=str(tmp_path / "a.jsonl"), functions={"f": answer})
    assert made.samples == 11 and made.rejected == {"bad-template": 1}
    assert made.rejects == "memory://recipes/out/rows-rejects.parquet"
    store = open_store("memory://recipes/out")
    assert set(store.list("")) == {"rows.parquet", "rows-rejects.parquet"}
    table = pq.read_table(BytesIO(store.read("rows.parquet")))
    path = table.column("image")[4]["path"].as_py()
    assert path.replace(":///", "://") == "memory://recipes/in/img/5.png"  # as fsspec names it
    assert sorted(asked) == ["circle", "square", "star"]
    folder = "memory://recipes/job/_batchgen/input"
    tree = merge(job(tmp_path, tmp_path), {"recipe.from": "memory://recipes/in/photos.parquet"})
    first = expanded(tree, folder)["input"]
    assert first["uri_roots"] == ["memory://recipes"]
    assert expanded(tree, folder)["input"] == first
    assert pq.read_metadata(BytesIO(open_store(folder).read(first["path"][-25:]))).num_rows == 24
