"""The tiers keep to what they may start, and `make near` finds what a change reaches."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import near
from tests.tiers import GROUPS, HEAVY, LONG, TESTS, TIERS

FILES = sorted(TESTS.rglob("test_*.py"))
IMPORT = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
loaded = set(sys.argv[1].split(",")) & sys.modules.keys()
assert not loaded, loaded
"""


def test_every_test_file_is_in_a_tier() -> None:
    assert {path.parent.relative_to(TESTS).as_posix() for path in FILES} == TIERS.keys()
    assert len({path.name for path in FILES}) == len(FILES)


def test_unit_tests_are_collected_without_torch_and_ray() -> None:
    units = [f"tests.unit.{path.stem}" for path in FILES if path.parent.name == "unit"]
    words = [sys.executable, "-c", IMPORT, ",".join(HEAVY), "tests.conftest", *units]
    done = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fixture", "words"),
    [("ray_session", r"\bray_session\b"), ("s3_server", r"\bs3_(server|bucket|proxy)\b")],
)
def test_the_files_that_share_something_are_those_that_use_its_fixture(
    fixture: str, words: str
) -> None:
    users = {path.stem for path in FILES if re.search(words, path.read_text())}
    assert users - {"test_tiers"} == set(GROUPS[fixture])


def test_the_files_that_run_first_exist() -> None:
    assert set(LONG) <= {path.stem for path in FILES}


@pytest.mark.parametrize(
    ("changed", "test", "steps"),
    [
        ("batchgen/cluster/spot.py", "tests/ray/test_spot.py", 1),
        ("batchgen/families/sana.py", "tests/model/test_family_stream.py", 3),
        ("batchgen/cli/stores.py", "tests/ray/test_s3_run.py", 2),  # by `python -m batchgen`
        ("tests/tiny_models.py", "tests/model/test_stages.py", 0),
        ("docs/output.md", "tests/unit/test_docs.py", 0),
        ("pyproject.toml", "tests/unit/test_plan.py", 0),
    ],
)
def test_what_a_change_reaches_is_near(changed: str, test: str, steps: int) -> None:
    assert test in near.near({changed}, steps)


def test_what_a_change_cannot_reach_is_not_near() -> None:
    found = near.near({"batchgen/cluster/spot.py"}, near.FAR - 1)
    assert "tests/unit/test_plan.py" not in found and len(found) < 5
