"""Every family in the dtypes that are the default on GPUs, here on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.families import FAMILIES, Family
from tests.family_specs import FAMILY_IDS
from tests.model.test_family_stream import DTYPES, rows, runs_in_16_bits

__all__ = ["rows"]  # a fixture
pytestmark = pytest.mark.long


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_every_family_runs_in_16_bits(
    family: Family, dtype: str, rows: Path, tmp_path: Path
) -> None:
    runs_in_16_bits(family, dtype, rows, tmp_path)
