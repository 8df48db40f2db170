"""One finished output in each format, and what it holds."""

from __future__ import annotations

import datetime
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchgen.output.formats import FORMATS, format_of
from batchgen.output.ledger import DATA, Ledger
from batchgen.output.verify import Findings, verify
from batchgen.plan.plan import Plan
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts, write_columns

SHARDS, ACCEPTED = 4, 18
BLOB = b"\x00\xff"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In each format: 4 shards of 6 samples, three labels; rows 1, 5 and 6 are dropped."""
    folder = tmp_path_factory.mktemp("formats")
    texts: list[str] = prompts(12)
    texts[1], texts[5], texts[6] = "", "flat picture", "broken picture"
    columns = {
        "prompt": texts,
        "kind": [number % 3 for number in range(12)],
        "blob": [BLOB] * 12,
        "when": [datetime.datetime(2024, 1, 2, 3, 4, 5)] * 12,
        "mask_file_name": ["none.png"] * 12,
    }
    path = write_columns(folder / "a.parquet", columns)
    for name in FORMATS:
        made(path, folder / name, name, variants=2, input__columns__label="kind")
    return folder


def made(path: Path, out: Path, name: str, **dotted: Any) -> tuple[Plan, Ledger]:
    """A finished output with its card, without Ray."""
    settings = {"output__samples_per_shard": 6, "output__format": name, **dotted}
    plan = plan_for(path, out, **settings)
    ledger = Ledger(open_store(str(out)))
    make_output(plan, ledger)
    finalize(plan, ledger, Tally(plan.shards, plan.samples))
    return plan, ledger


def findings(out: Path, quick: bool = False) -> Findings:
    return verify(Ledger(open_store(str(out))), quick)


def digests(out: Path) -> dict[str, str]:
    """key -> sha256 as our own reader has them."""
    ledger = Ledger(open_store(str(out)))
    plan = ledger.require_plan()
    found: dict[str, str] = {}
    for marker in ledger.markers(range(plan.shards)):
        names = [file.name for file in marker.files if "/rejects/" not in file.name]
        table = format_of(plan).read({name: (out / name).read_bytes() for name in names})
        found |= zip(*(table.column(one).to_pylist() for one in ("key", "sha256")), strict=True)
    return found


def pixels(data: Any) -> bytes:
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    return np.asarray(image).tobytes()


def expected_pixels(whole: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted((whole / "image-folder" / DATA).rglob("*.png")):
        found[path.stem] = pixels(path.read_bytes())
    return found
