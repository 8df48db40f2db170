"""Ray Data reads what batchgen writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.output.ledger import DATA
from tests.every_format import digests, expected_pixels, whole

__all__ = ["whole"]  # a fixture
pytestmark = pytest.mark.long


def test_ray_reads_parquet_and_webdataset(whole: Path, ray_session: None) -> None:
    import ray.data

    table = ray.data.read_parquet(str(whole / "parquet" / DATA)).to_pandas()
    assert {row.key: row.sha256 for row in table.itertuples()} == digests(whole / "parquet")
    rows = ray.data.read_webdataset(str(whole / "webdataset" / DATA)).take_all()
    expected = expected_pixels(whole)
    assert {row["__key__"]: row["png"].tobytes() for row in rows} == expected
    assert all(row["cls"] == row["json"]["label"] for row in rows)
