"""The report in a real browser."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.test_report import output

__all__ = ["output"]  # a fixture
BROWSER = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1600",
]


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        assert "CI" not in os.environ, ".ci/run installs chromium"
        pytest.skip("needs chromium")
    return found


def test_page_renders_in_a_browser(output: Path, browser: str, tmp_path: Path) -> None:
    page = (output / "_batchgen" / "report.html").as_uri()
    shot = tmp_path / "page.png"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    words = [browser, *BROWSER, profile, f"--screenshot={shot}", page]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 300  # noise images are on it
    words = [browser, *BROWSER, profile, "--dump-dom", page]
    dom = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "<title>batchgen: 3 images" in dom  # the prompt's script did not run
    assert dom.count("<figure>") == 3
