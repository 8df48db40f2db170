"""The wheel works when installed elsewhere, and contains the shipped model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "batchgen", source / "batchgen")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    words = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("batchgen-*.whl")
    return built


def test_wheel_holds_the_model_and_the_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    model = "batchgen/shipped/digits-shapes"
    for name in (
        f"{model}/model_index.json",
        f"{model}/unet/diffusion_pytorch_model.safetensors",
        f"{model}/tokenizer/vocab.json",
        "batchgen/templates/report.html",
        "batchgen/templates/DejaVuSans.ttf",
        "batchgen/templates/DejaVuSans.LICENSE.txt",
        "batchgen/py.typed",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "jobs/"))]


def test_installed_elsewhere_it_plans_with_its_own_model(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    words = [*pip, "install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    pq.write_table(pa.table({"prompt": ["a red circle"]}), tmp_path / "in.parquet")
    words = [sys.executable, "-m", "batchgen", "plan", "--input", "in.parquet", "--output", "out"]
    done = subprocess.run(
        [*words, "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["model"]["path"].startswith(str(site))
