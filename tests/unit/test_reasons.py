"""The list of reasons: what the code gives, what the list has and what docs/input.md says agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from batchgen.errors import RejectRow
from batchgen.output.restrict import NOT_SELECTED
from batchgen.reasons import FAILURES, REASONS, is_reason, table
from batchgen.shard.prepare import LEFT_OUT
from batchgen.spec.sections import Policy
from batchgen.stages.scorers.filters import FILTERS

ROOT = Path(__file__).parents[2]
BY_FILTER = {one.reason for one in FILTERS}
GIVERS = {"RejectRow", "_reject"}


def given() -> set[str]:
    """The reasons in the calls of the package, with <> for what is filled in."""
    found = set()
    for path in (ROOT / "batchgen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in GIVERS:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    found.add(str(first.value))
                elif isinstance(first, ast.JoinedStr):
                    parts = [
                        one.value if isinstance(one, ast.Constant) else "<>" for one in first.values
                    ]
                    found.add("".join(map(str, parts)))
    return found


def unnamed(reason: str) -> str:
    return re.sub("<.*?>", "<>", reason)


def test_the_list_has_each_reason_that_is_given_and_no_other() -> None:
    listed = {unnamed(reason) for reason in REASONS} - BY_FILTER
    by_pattern = {"bad-prompt", "bad-negative_prompt"}  # given as bad-<part>
    found = given() | {NOT_SELECTED}
    assert {one for one in found if one not in listed and not is_reason(one)} == set()
    assert listed - by_pattern - found == set()


def test_filters_reject_by_a_policy_for_a_reason_of_the_list() -> None:
    assert REASONS.keys() >= BY_FILTER
    assert {one.policy for one in FILTERS} <= Policy.model_fields.keys()
    assert LEFT_OUT in FAILURES


@pytest.mark.parametrize("name", ["bad-eta", "null-mask", "mask-too-small", "uri-timeout"])
def test_names_are_known_by_pattern(name: str) -> None:
    assert is_reason(name)
    assert RejectRow(name, "said").reason == name


@pytest.mark.parametrize("name", ["", "bad-", "-too-large", "empty", "flat-images"])
def test_a_name_that_is_not_in_the_list_is_a_programming_error(name: str) -> None:
    with pytest.raises(AssertionError, match="not in the list of reasons"):
        RejectRow(name, "said")


def test_the_page_has_the_table_of_the_list() -> None:
    assert table() in (ROOT / "docs" / "input.md").read_text()
