"""The commands of the docs' pages that start jobs; the others run in `tests/ray/test_docs.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_pages import PAGES, README, checkout, environment, run_page, starts_a_job

__all__ = ["checkout", "environment"]  # fixtures
HERE = [page for page in PAGES if page != README and starts_a_job(page)]


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.name)
def test_commands_run(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    run_page(page, checkout, environment)
