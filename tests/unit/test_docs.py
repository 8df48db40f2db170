"""The docs are true: pages show what the code has, and links lead somewhere.

`tests/system/test_docs_commands.py` runs their commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from batchgen.cli import task_pages
from batchgen.spec.model import Section
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import TASK_NAMES
from tests.docs_pages import DOCS, PAGES, ROOT, blocks

LINK = re.compile(r"\]\(([^)#]+)\)")


def test_every_page_has_a_command_and_no_dead_link() -> None:
    for page in PAGES:
        assert blocks(page), f"{page.name} shows no command"
        for target in LINK.findall(page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


TABLES = {
    "tasks.md": ("task_table", "family_table"),
    "tasks/control.md": ("maker_table",),
    "approximate.md": ("approximation_table",),
    "labels.md": ("label_maker_table",),
}


@pytest.mark.parametrize(
    ("page", "table"), [(page, table) for page, tables in TABLES.items() for table in tables]
)
def test_tables_are_those_of_the_code(page: str, table: str) -> None:
    """`python -c "from batchgen.cli import task_pages as t; print(t.family_table())"` makes it."""
    assert getattr(task_pages, table)() in (DOCS / page).read_text()


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_has_a_page_that_shows_its_spec(task: str) -> None:
    spec = (ROOT / "jobs" / "tasks" / f"{task}.yaml").read_text()
    assert f"```yaml\n{spec}```" in (DOCS / "tasks" / f"{task}.md").read_text()


def test_pictures_are_small() -> None:
    for picture in (DOCS / "images" / "tasks").iterdir():
        assert picture.stat().st_size < 60_000, picture.name


def leaves(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_field_of_the_spec_is_documented() -> None:
    text = (ROOT / "docs" / "spec.md").read_text() + (ROOT / "docs" / "input.md").read_text()
    for leaf in leaves(Spec):
        section, _, name = leaf.rpartition(".")
        shown = [f"`{leaf}`", f"`{name}`", f"`.{name}`"]
        if section == "input.columns":
            shown.append(f"| {name.replace('_', ' ')} |")
        assert any(words in text for words in shown), leaf
