"""Every command in README and docs/ runs, in the order a reader meets them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen.cli import task_pages
from batchgen.spec.model import Section
from batchgen.spec.spec import Spec
from batchgen.spec.tasks import TASK_NAMES
from tests.cluster import head
from tests.object_store.server import missing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("tasks/*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")
NOT_HERE = {"make test", ". .venv/bin/activate"}  # this test is part of the first
S3_SERVER = "tests.object_store.server"  # in blocks that need programs beside Python's


def blocks(page: Path) -> list[str]:
    found = []
    for block in BLOCK.findall(page.read_text()):
        lines = [line for line in block.splitlines() if line not in NOT_HERE]
        found.append("\n".join(lines))
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a fresh clone, whose set-up is done already by the environment at hand."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "ray-cluster.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("jobs", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tests").symlink_to(ROOT / "tests")
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "batchgen"):
        command = bin_folder / name
        command.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
        command.chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    yield folder
    if (folder / "out" / "s3" / "pids.json").exists():  # a block failed before it stopped it
        stop = [sys.executable, "-m", S3_SERVER, "--folder", str(folder / "out" / "s3"), "--stop"]
        subprocess.run(stop, cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """With a `ray` that starts and ends a head of its own; short paths, for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="bgd"))
    yield {**os.environ, **head.install(folder)}
    head.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    env = environment
    if page.name != "README.md" and not (checkout / "out" / "demo").exists():
        subprocess.run(["make", "demo"], cwd=checkout, env=env, check=True, capture_output=True)
    left_out = S3_SERVER if missing() and not os.environ.get("CI") else None
    for block in blocks(page):
        if left_out and left_out in block:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=checkout,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    if left_out and any(left_out in block for block in blocks(page)):
        pytest.skip(f"all but what needs an S3 server: install {' '.join(missing())}")


def test_every_page_has_a_command_and_no_dead_link() -> None:
    for page in PAGES:
        assert blocks(page), f"{page.name} shows no command"
        for target in LINK.findall(page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


TABLES = {
    "tasks.md": ("task_table", "family_table"),
    "tasks/control.md": ("maker_table",),
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
