"""Calls of all planned shapes, which a replica compiles before its first shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.engine.warm_up import compile_before, planned_calls
from batchgen.plan.plan import Plan, make_plan
from tests.datasets_on_disk import MODEL, spec_for, write_columns


@pytest.fixture
def source(tmp_path: Path) -> Path:
    columns = {"prompt": ["a", "b"], "guide": [1.0, 3.0]}
    return write_columns(tmp_path / "in.parquet", columns)


def planned(source: Path, guidable: bool = True, **settings: Any) -> Plan:
    return make_plan(spec_for(source, **settings), replace(MODEL, guidable=guidable))


def scales(plan: Plan) -> list[float]:
    return [call.guidance_scale for call in planned_calls(plan)]


def test_rows_without_a_scale_have_one_shape(source: Path) -> None:
    (call,) = planned_calls(planned(source))
    assert (call.guidance_scale, call.width, call.height) == (3.0, 16, 8)
    (call,) = planned_calls(planned(source, sampling__guidance_scale=1, sampling__width=32))
    assert (call.guidance_scale, call.width) == (1.0, 32)


def test_rows_with_a_scale_are_guided_or_not(source: Path) -> None:
    column = {"input__columns__guidance_scale": "guide"}
    assert scales(planned(source, **column)) == [3.0, 1.0]
    assert scales(planned(source, **column, sampling__guidance_scale=1)) == [2.0, 1.0]
    unguided = planned(source, guidable=False, **column, sampling__guidance_scale=1)
    assert scales(unguided) == [1.0]


def test_nothing_is_compiled_unless_asked(source: Path) -> None:
    assert compile_before(planned(source), "here", lambda: {"denoise": object()}) is None
    asked = planned(source, resources__compile="full")
    assert compile_before(asked, "here", lambda: {"encode": object()}) is None
    assert compile_before(asked, "here", dict) is None
