"""What contributors read is true: files, names, make targets, hooks and links exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "CONTRIBUTING.md"
DECISIONS = ROOT / "docs" / "decisions"
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
PATH = re.compile(r"[\w./-]+\.(py|md|html|yaml|txt)")
PLACEHOLDER = re.compile(r"\b(?:\w+_)?(FAMILY|FORMAT|KIND|SCORER|TASK|NAME)\b")


def section(title: str) -> str:
    return GUIDE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def targets() -> dict[str, str]:
    """Target of the Makefile -> the rest of its line."""
    lines = re.findall(r"^([a-z][\w-]*):(?!=)(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return dict(lines)


def named() -> Iterator[tuple[str, str | None]]:
    """File, and a name that it holds, as the table of changes has them."""
    for row in section("How do I add ...?").splitlines():
        for cell in row.split(" | ")[1:]:
            path = None
            for token in CODE.findall(cell):
                if PATH.fullmatch(token):
                    path = None if PLACEHOLDER.search(token) else token
                    if path:
                        yield path, None
                elif path and token.isidentifier():
                    yield path, token


def test_files_and_names_of_the_table_of_changes_exist() -> None:
    found = list(named())
    assert len(found) > 60
    for path, name in found:
        assert (ROOT / path).is_file(), f"{path} has moved: update CONTRIBUTING.md"
        if name:
            there = re.search(rf"\b{name}\b", (ROOT / path).read_text())
            assert there, f"{path} has no {name}: update CONTRIBUTING.md"


def test_make_help_lists_every_target() -> None:
    help_text = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^  make (\S+) +\S", help_text, re.MULTILINE)) == targets().keys()


def test_every_loop_is_described_and_exists() -> None:
    described = set(re.findall(r"^\| `make ([\w-]+)` \|", section("The loops"), re.MULTILINE))
    assert described == targets().keys() - {"help", "clean"}


def test_hooks_run_what_make_check_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert set(re.findall(r"\$\(BIN\)/(.+)", recipe)) <= hooks


def test_every_decision_is_in_the_index() -> None:
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (DECISIONS / "README.md").read_text())
    assert listed == sorted(path.name for path in DECISIONS.glob("0*.md"))


@pytest.mark.parametrize(
    "page", [GUIDE, ROOT / "SECURITY.md", *sorted(DECISIONS.glob("*.md"))], ids=lambda one: one.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
