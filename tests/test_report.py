"""The report page in a real browser, the card and the sheet."""

from __future__ import annotations

import html
import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from batchgen import runner
from batchgen.ledger import FailedMarker, Ledger
from batchgen.progress import Tally
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for

NASTY = "<script>document.title='owned'</script> & \"quotes\""
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
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finalized output with accepted, rejected and failed samples and one failed shard."""
    folder = tmp_path_factory.mktemp("report")
    texts = [NASTY, "flat", "broken", None, "a red circle", "a star", "never", "made"]
    pq.write_table(pa.table({"prompt": texts}), folder / "in.parquet")
    plan = plan_for(folder / "in.parquet", folder / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(str(folder / "out")))
    make_output(plan, ledger)
    (folder / "out" / "_batchgen" / "shards" / "00003.json").unlink()
    ledger.fail(FailedMarker(3, 2, "RuntimeError", "it <b>broke</b>", "trace", 3, "host", 0.0))
    runner.finalize(plan, ledger, Tally(plan.shards, plan.samples))
    return folder / "out"


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


def test_page_tells_every_outcome(output: Path) -> None:
    page = (output / "_batchgen" / "report.html").read_text()
    assert "Not complete." in page and "it &lt;b&gt;broke&lt;/b&gt;" in page
    for reason in ("flat-image", "non-finite", "null-prompt"):
        assert reason in page
    assert NASTY not in page and html.escape("<script>") in page


def test_card_counts_and_loads(output: Path) -> None:
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert "| accepted | 3 |" in card and "| rejected: flat-image | 1 |" in card
    assert "| failed | 3 |" in card


def test_sheet_is_a_picture(output: Path) -> None:
    sheet = Image.open(io.BytesIO((output / "_batchgen" / "contact-sheet.png").read_bytes()))
    assert sheet.size[0] > 1000 and len(set(sheet.convert("L").tobytes())) > 100
