"""Quotas and remade samples: what is counted, what ends the rounds, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchgen.curate.rounds import check_rounds
from batchgen.errors import SpecError
from tests.unit.test_quota import plan_with

ASKED = {"per": ["label"], "accepted": 7, "where": "seed % 10 < 3", "budget": 400}


@pytest.mark.parametrize("where", ["size", "(seed % 10 < 3)::int", "kind", "nothing > 1"])
def test_what_is_no_condition_is_refused(where: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"quota\.where"):
        check_rounds(plan_with(tmp_path, quota={**ASKED, "where": where}))
    check_rounds(plan_with(tmp_path, quota={**ASKED, "where": "size > 1 -- large"}))
