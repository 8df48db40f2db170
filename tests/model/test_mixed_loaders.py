"""A training set of `batchgen mix` in the loaders of others: torch's DataLoader and `datasets`."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from batchgen.curate.mix import plan_mix
from batchgen.curate.mix_files import write_mix
from batchgen.curate.mix_set import Mix
from batchgen.curate.mixed import MixedImages
from batchgen.storage import open_store
from tests.pictured_outputs import SIDE, image_set, textures

REAL, MADE = 8, 16
CLASSES = ["cat", "dog"]


@pytest.fixture(scope="module", params=["parquet", "image-folder", "webdataset"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    real = image_set(folder / "real.parquet", textures(REAL, 1), label=CLASSES * 4)
    made = image_set(folder / "made.parquet", textures(MADE, 2), label=CLASSES * 8)
    mix = Mix(str(real), (str(made),), replace_probability=0.5)
    write_mix(plan_mix(mix), open_store(str(folder / request.param)), request.param)
    return folder / request.param


def test_workers_of_a_data_loader_draw_what_the_process_draws(target: Path) -> None:
    images = MixedImages(str(target), transform=np.asarray, seed=5)
    drawn = []
    for epoch in range(2):
        images.set_epoch(epoch)
        alone = [images[number] for number in range(len(images))]
        loader = DataLoader(images, batch_size=3, num_workers=2, multiprocessing_context="spawn")
        batches = list(loader)
        keys = [key for batch in batches for key in batch["key"]]
        assert keys == [one["key"] for one in alone]
        assert batches[0]["image"].shape == (3, SIDE, SIDE, 3)
        made = [one["is_synthetic"] for one in alone]
        assert [bool(one) for batch in batches for one in batch["is_synthetic"]] == made
        drawn.append([images.row_of(number) for number in range(len(images))])
    assert drawn[0] != drawn[1]


def test_datasets_loads_the_manifest_and_the_images(target: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    files = str(target / "manifest.parquet")
    manifest = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert len(manifest) == REAL + MADE
    assert manifest.features["label"].names == CLASSES
    assert sum(manifest["is_synthetic"]) == MADE
    builder, files = {
        "parquet": ("parquet", "data/*.parquet"),
        "image-folder": ("imagefolder", "data/**"),
        "webdataset": ("webdataset", "data/*.tar"),
    }[target.name]
    images = datasets.load_dataset(
        builder, data_files=str(target / files), split="train", cache_dir=cache
    )
    assert len(images) == REAL + MADE
    first = images[0]
    assert first["png" if builder == "webdataset" else "image"].size == (SIDE, SIDE)
