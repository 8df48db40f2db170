"""torchvision reads exported labels and image folders: CocoDetection, VOCDetection, ImageFolder.

torchvision must not be in the tests' environment: transformers would resize images by it, so that
pixels change. Its wheel is unpacked into a folder of its own, for one process. Its compiled part
does not load next to a torch for the CPU; its datasets are Python and do not need it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from batchgen.output.datasets.choose import export_to
from batchgen.output.ledger import Ledger
from batchgen.storage import open_store
from tests.labelled_outputs import (
    CATEGORIES,
    SPLITS,
    VOID_ROW,
    labelled_output,
    objects_of,
    write_source,
)

pytestmark = pytest.mark.long
READ = """
import json, re, sys
from importlib.util import find_spec
from pathlib import Path
import torch

folder = Path(sys.argv[1])
unpacked = Path(find_spec("torchvision").submodule_search_locations[0])
library = torch.library.Library("torchvision", "DEF")
text = (unpacked / "_meta_registrations.py").read_text()
for name in re.findall(r'register_fake\\("torchvision::(\\w+)"', text):
    library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

from torchvision.datasets import CocoDetection, ImageFolder, VOCDetection

found = {}
annotations = folder / "coco/annotations/instances_train.json"
images = CocoDetection(folder / "coco/images/train", annotations)
found["coco"] = [
    [images.coco.loadImgs(number)[0]["file_name"], image.size, labels]
    for number, (image, labels) in zip(images.ids, images, strict=True)
]
images = ImageFolder(folder / "image-folder/data")
found["classes"] = images.classes
found["folder"] = [[Path(path).name, number] for path, number in images.samples]
found["sizes"] = [image.size for image, _ in images]
images = VOCDetection(folder / "voc", year="2012", image_set="train")
found["voc"] = [[image.size, labels["annotation"]] for image, labels in images]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def unpacked() -> Path:
    """A folder with torchvision, of the version for this torch; kept for the next run."""
    minor = int(version("torch").split(".")[1])
    wanted = f"torchvision==0.{minor + 15}.0"
    folder = Path(tempfile.gettempdir()) / f"batchgen-{wanted.replace('==', '-')}"
    if not (folder / "torchvision").is_dir():
        options = ["--quiet", "--no-deps", "--no-compile", "--target", str(folder), wanted]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True
        )
        if done.returncode and not os.environ.get("CI"):
            pytest.skip(f"{wanted} cannot be installed: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What torchvision reads."""
    folder = tmp_path_factory.mktemp("torchvision")
    source = write_source(folder / "a.parquet")
    labelled_output(
        source, folder / "image-folder", "objects", "label_mask", output__format="image-folder"
    )
    out = Ledger(open_store(str(folder / "image-folder")))
    export_to(out, open_store(str(folder / "coco")), "coco")
    # VOCDetection opens files that end in .jpg only
    jpeg = labelled_output(source, folder / "jpeg", "objects", output__image_format="jpeg")
    export_to(jpeg, open_store(str(folder / "voc/VOCdevkit/VOC2012")), "voc")
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


TRAIN = [row for row in range(12) if SPLITS[row % 4] in ("train", "") and row != VOID_ROW]


def row_of(name: str) -> int:
    return int(name.split("-")[1])


def test_coco_detection(found: dict[str, Any]) -> None:
    assert [row_of(name) for name, _, _ in found["coco"]] == TRAIN
    for name, size, labels in found["coco"]:
        assert size == [16, 8]
        assert [one["bbox"] for one in labels] == objects_of(row_of(name))["bbox"]
        assert [one["image_id"] for one in labels] == [row_of(name) + 1] * len(labels)


def test_image_folder(found: dict[str, Any]) -> None:
    assert found["classes"] == ["0", "1", "2"]
    assert sorted(row_of(name) for name, _ in found["folder"]) == list(range(12))
    assert all(number == row_of(name) % 3 for name, number in found["folder"])
    assert found["sizes"] == [[16, 8]] * 12


def test_voc_detection(found: dict[str, Any]) -> None:
    assert [row_of(labels["filename"]) for _, labels in found["voc"]] == TRAIN
    for size, labels in found["voc"]:
        assert size == [16, 8]
        objects = objects_of(row_of(labels["filename"]))
        names = [one["name"] for one in labels.get("object", [])]
        assert names == [CATEGORIES[number]["name"] for number in objects["category"]]
