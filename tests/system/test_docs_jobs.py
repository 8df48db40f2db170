"""The commands of the docs' pages that start jobs; the others run in `tests/ray/test_docs.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_pages import (
    DOCS,
    PAGES,
    README,
    checkout,
    environment,
    run_page,
    starts_a_job,
    starts_a_server,
)

__all__ = ["checkout", "environment"]  # fixtures
HERE = [page for page in PAGES if page != README and starts_a_job(page)]
TASKS = DOCS / "tasks"
SHORT = ("control",)  # of the pages of tasks, which are much alike
LONG = [page for page in HERE if page.parent == TASKS and page.stem not in SHORT]


@pytest.mark.parametrize(
    "page",
    [pytest.param(one, marks=pytest.mark.long) if one in LONG else one for one in HERE],
    ids=lambda page: page.name,
)
def test_commands_run(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    run_page(page, checkout, environment)


def test_readme_s_servers(checkout: Path, environment: dict[str, str]) -> None:
    run_page(README, checkout, environment, starts_a_server)
