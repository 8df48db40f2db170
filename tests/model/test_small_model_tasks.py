"""The shipped model's parts for more tasks: class labels, and a ControlNet for edges."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel, StableDiffusionPipeline
from safetensors.torch import load_file

from batchgen import models
from batchgen.models.find import shipped_names, shipped_parts
from batchgen.models.own import ClassEmbedder
from batchgen.spec.model import Model
from jobs.small_model import classes
from jobs.small_model.__main__ import main
from jobs.small_model.added import load_frozen
from jobs.small_model.captions import shape_caption
from jobs.small_model.card import read_card
from jobs.small_model.classes import CLASSES, paint_classes, train_classes
from jobs.small_model.control import agreement, edges_of, paint, train_control
from jobs.small_model.data import COLOURS, SHAPES, drawn_shapes
from jobs.small_model.judges import fit_digit_judge
from jobs.small_model.recipe import class_recipe, control_recipe

MODEL = Path(__file__).parents[2] / "batchgen" / "shipped" / "digits-shapes"
CANNY = MODEL.with_name("digits-shapes-canny")
PARTS = (MODEL / "class_embedder", CANNY)
MOST_BYTES = 6 * 1000 * 1000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_frozen(MODEL)


def test_the_parts_are_small_and_whole() -> None:
    files = [path for folder in PARTS for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".safetensors":
            assert all(bool(torch.isfinite(value).all()) for value in load_file(path).values())


def test_the_card_names_the_parts_figures() -> None:
    added, readme = read_card(MODEL)["added"], (MODEL / "README.md").read_text()
    assert added["classes"]["metrics"]["class_agreement"] >= 0.8
    edges = added["control"]["metrics"]
    assert edges["shape_edges_f1"] >= 0.8 > edges["shape_edges_f1_without"]
    for figure in (added["classes"]["metrics"]["class_agreement"], edges["shape_edges_f1"]):
        assert f"{figure:.3f}" in readme


def test_a_shipped_part_is_found_by_its_name_and_is_no_model() -> None:
    model = Model(path="digits-shapes", components={"controlnet": "digits-shapes-canny"})
    assert models.inspect(model, "control").controls == 1
    assert shipped_parts() == ["digits-shapes-canny"]
    assert shipped_names() == ["digits-shapes"]


def test_classes_go_by_name() -> None:
    info = models.inspect(Model(path="digits-shapes"), "class-conditional")
    assert (info.family, info.class_names) == ("ldm-class", CLASSES)


def test_a_digits_class_gives_that_digit(pipeline: StableDiffusionPipeline) -> None:
    table = ClassEmbedder.from_pretrained(MODEL / "class_embedder", dtype=torch.float32)
    numbers = torch.arange(20) % 10
    pictures = paint_classes(pipeline, table, numbers, read_card(MODEL)["recommended"])
    right = fit_digit_judge().digits(pictures) == numbers
    assert float(right.float().mean()) >= 0.8


def test_edges_are_followed_in_the_colours_asked_for(pipeline: StableDiffusionPipeline) -> None:
    net = ControlNetModel.from_pretrained(CANNY, dtype=torch.float32)
    edges = edges_of(drawn_shapes(8, 5_000).images)  # (8, 32, 32)
    labels = drawn_shapes(8, 5_000).labels[:, 0].tolist()
    captions = [shape_caption(SHAPES[shape], "red", "white") for shape in labels]
    settings = read_card(MODEL)["recommended"]
    held = paint(pipeline, net, captions, edges, settings)
    free = paint(pipeline, None, captions, edges, settings)
    assert agreement(edges_of(held), edges) > 0.1 + agreement(edges_of(free), edges)
    corners = held[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].float().median(2).values  # (8, 3)
    assert float((corners - torch.tensor(COLOURS["white"])).abs().mean()) < 40


@pytest.mark.parametrize("stage", ["classes", "control"])
def test_an_interrupted_stage_ends_with_the_same_bits(stage: str, tmp_path: Path) -> None:
    train = {"classes": train_classes, "control": train_control}[stage]
    recipe = {"classes": class_recipe, "control": control_recipe}[stage]().smoke()
    whole = train(MODEL, tmp_path / "whole", recipe).averaged.state_dict()
    assert not train(MODEL, tmp_path / "parts", recipe, 2).done
    parts = train(MODEL, tmp_path / "parts", recipe)
    assert parts.done
    found = parts.averaged.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_a_part_that_is_too_bad_is_not_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(classes, "class_metrics", lambda *_: {"class_agreement": 0.5})
    words = ["classes", str(model), "--out", str(out), "--smoke"]
    with pytest.raises(ValueError, match=r"the class is right in 0\.5"):
        CliRunner().invoke(main, words, catch_exceptions=False)
    assert all(path.read_bytes() == content for path, content in before.items())
