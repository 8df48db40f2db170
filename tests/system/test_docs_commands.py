"""The commands of README and docs/ run, page by page, as a reader would type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_pages import PAGES, checkout, environment, run_page, starts_a_job

__all__ = ["checkout", "environment"]  # fixtures
SHORT = ("README", "output", "resume", "submit")  # of the pages that start jobs; others are long


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(one, marks=pytest.mark.long)
        if starts_a_job(one) and one.stem not in SHORT
        else one
        for one in PAGES
    ],
    ids=lambda page: page.name,
)
def test_commands_run(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    run_page(page, checkout, environment)
