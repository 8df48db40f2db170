"""A model's configurations with arbitrary content are used or refused with a clear message."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import BatchgenError, ModelError
from batchgen.models import inspect
from batchgen.models.find import SHIPPED
from batchgen.plan.checks import settle
from batchgen.spec.build import build
from tests.fuzzing import fuzz

SOURCE = SHIPPED / "digits-shapes"
READ = ("config.json", "index.json", "batchgen.json")
CONFIGS = sorted(path.relative_to(SOURCE) for end in READ for path in SOURCE.rglob(f"*{end}"))
NEVER: list[Any] = [
    *(None, True, 0, -1, 1 << 70, 0.5, "", "x", "../.."),
    *([], [0], ["a", "b"], {}, {"a": 1}),
]
IMPOSSIBLE = ("x" * 5000, "a/" + "b" * 5000, "~nobody-here/x", "x" * 300 + ".ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, its weights by links."""
    return linked(tmp_path_factory.mktemp("model"))


def linked(target: Path) -> Path:
    for path in SOURCE.rglob("*"):
        here = target / path.relative_to(SOURCE)
        if path.is_dir():
            here.mkdir(parents=True, exist_ok=True)
            continue
        here.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            here.write_bytes(path.read_bytes())
        else:
            os.symlink(path, here)
    return target


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree[:3])
        if isinstance(tree, list)
        else ()
    )
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


def looked_at(folder: Path, task: str) -> None:
    spec = build({"input": "x", "output": "y", "task": task, "model": str(folder)})
    info = inspect(spec.model, task)
    settle(spec, info)


values = st.one_of(st.sampled_from(NEVER), st.integers(-2, 100_000), st.text(max_size=4))


@fuzz()
@given(st.data())
def test_no_configuration_is_a_traceback(folder: Path, data: st.DataObject) -> None:
    file = folder / data.draw(st.sampled_from(CONFIGS))
    before = file.read_bytes()
    tree = json.loads(before)
    path = data.draw(st.sampled_from(list(places(tree))))
    file.write_text(json.dumps(changed(tree, path, data.draw(values))))
    try:
        looked_at(folder, "text-to-image")
    except BatchgenError as error:
        assert "validation error" not in str(error)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("size", [0, -8, 3, 5000, "8", [8], [8, 0], 0.5, True, None])
def test_a_native_size_that_no_image_has_is_refused_by_name(size: Any, tmp_path: Path) -> None:
    folder = linked(tmp_path / "model")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": size}))
    if size == [8]:
        looked_at(folder, "text-to-image")
        return
    with pytest.raises(ModelError, match="sample_size"):
        looked_at(folder, "text-to-image")


def test_the_name_of_another_task_is_told_shortly(tmp_path: Path) -> None:
    folder = linked(tmp_path / "model")
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelError) as caught:
        looked_at(folder, "text-to-image")
    assert "is a NoSuchPipeline; allowed for text-to-image: " in str(caught.value)
    assert "`batchgen tasks text-to-image` lists all" in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "")) < 250


@pytest.mark.parametrize("weights", [[], ["x"], "x", {"a": 1}, {"a": ["b"]}, None])
def test_a_weight_map_of_another_shape_is_refused_by_name(weights: Any, tmp_path: Path) -> None:
    folder = linked(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ModelError, match=r"index\.json: weight_map"):
        looked_at(folder, "text-to-image")


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a/" + "b" * 5000, "~nobody-here/x", "x" * 300 + ".ckpt"]
)
def test_a_model_of_an_impossible_name_is_not_there(path: str) -> None:
    with pytest.raises(ModelError):
        looked_at(Path(path), "text-to-image")


def test_a_ckpt_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"from_single_file\(FILE\)\.save_pretrained\(FOLDER\)"):
        looked_at(tmp_path / "old.ckpt", "text-to-image")
