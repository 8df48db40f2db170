"""The settings of a call are derived from ``Sampling``, whatever type of value they have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pytest
from pydantic import Field

from batchgen.output.formats import EXTRA_COLUMNS
from batchgen.plan.checks import _fits
from batchgen.spec.call_settings import CALL_SETTINGS, KINDS, TEXT_SETTINGS, setting_of
from batchgen.spec.model import Section
from tests.edited_package import EDITS, edited_package, run_edited


class Samplings(Section):
    """Fields of every type that a setting may have, and two that it may not."""

    whole: Annotated[int, Field(ge=0)] | None = None
    real: float = 1.0
    reals: float | tuple[Annotated[float, Field(le=1)], ...] = 1.0
    text: Annotated[str, Field(max_length=5)] = ""
    choice: Literal["near", "far"] | None = None
    switch: bool = False
    mixed: int | str = 0
    data: bytes = b""


@pytest.mark.parametrize(
    ("name", "kind", "several"),
    [
        ("whole", int, False),
        ("real", float, False),
        ("reals", float, True),
        ("text", str, False),
        ("choice", str, False),
        ("switch", bool, False),
    ],
)
def test_a_setting_has_the_kind_of_its_field(name: str, kind: type, several: bool) -> None:
    setting = setting_of(Samplings, name)
    assert (setting.kind, setting.several) == (kind, several)
    assert kind in KINDS


@pytest.mark.parametrize("name", ["mixed", "data"])
def test_a_field_of_several_types_or_none_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Samplings\.{name}: one type of value is needed, of int"):
        setting_of(Samplings, name)


@pytest.mark.parametrize(
    ("name", "kind", "fits"),
    [
        ("text", pa.string(), True),
        ("text", pa.null(), True),
        ("text", pa.int64(), False),
        ("choice", pa.large_string(), True),
        ("switch", pa.bool_(), True),
        ("switch", pa.int8(), False),
        ("whole", pa.int8(), True),
        ("whole", pa.float32(), False),
        ("real", pa.float32(), True),
        ("real", pa.string(), False),
        ("reals", pa.list_(pa.float32()), True),
    ],
)
def test_which_columns_hold_a_setting(name: str, kind: pa.DataType, fits: bool) -> None:
    assert _fits(setting_of(Samplings, name), kind)[0] == fits


def test_the_settings_that_are_there_keep_their_columns() -> None:
    assert TEXT_SETTINGS == ()
    assert {
        name: str(EXTRA_COLUMNS.field(name).type)
        for name in CALL_SETTINGS
        if name in EXTRA_COLUMNS.names
    } == {
        "eta": "double",
        "image_guidance_scale": "double",
        "noise_level": "int32",
        "control_scale": "list<item: double>",
        "image_prompt_scale": "double",
        "denoising_end": "double",
    }


NEW = """
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

import batchgen
from batchgen.errors import InputError, SpecError
from batchgen.output.formats import own_columns
from batchgen.plan.checks import check_columns, check_fit, refuse_idle_settings, settle
from batchgen.plan.plan import Plan
from batchgen.report.card import _MEANINGS
from batchgen.report.settings import applying
from batchgen.shard.prepare import prepare
from tests.datasets_on_disk import MODEL, spec_for
from tests.unit.test_prepare import shard_of

assert Path(batchgen.__file__).is_relative_to(sys.argv[1])
MAPPED = {"input__columns__style": "s", "input__columns__repeats": "c"}
spec = spec_for("in", sampling__style="in oil", **MAPPED)
model = replace(MODEL, settings=("eta", "style", "repeats"))
check_fit(spec, model)
for other in (spec, spec_for("in", sampling__style="in oil")):
    with pytest.raises(SpecError, match="does not support style"):
        check_fit(other, MODEL)
        refuse_idle_settings(other, MODEL)
with pytest.raises(SpecError, match="class-conditional uses no style"):
    spec_for("in", task="class-conditional", input__columns__class_label="l", sampling__style="x")
with pytest.raises(SpecError, match="allowed: text, up to 20 characters"):
    spec_for("in", sampling__style="x" * 21)

fields = {"prompt": pa.string(), "s": pa.string(), "c": pa.int8()}
check_columns(spec, pa.schema(fields), "in")
with pytest.raises(InputError, match="column 's' in in has type int64; needed: text"):
    check_columns(spec, pa.schema({**fields, "s": pa.int64()}), "in")

plan = Plan(settle(spec, model), model, (), (), 0)
texts = ["in ink", None, "", "x" * 21, "x" * 10_001, "in ink"]
skips = pa.array([2, None, 1, 1, 1, 3], pa.int8())
made = prepare(shard_of({"prompt": ["p"] * 6, "s": texts, "c": skips}), plan)
calls = [(sample.call.style, sample.call.repeats) for sample in made.samples]
assert calls == [("in ink", 2), ("in oil", 1), ("", 1)], calls
reasons = {one.reason: one.message for one in made.dropped}
assert reasons.keys() == {"bad-style", "long-style", "bad-repeats"}, reasons
assert reasons["bad-style"].endswith("allowed: text, up to 20 characters"), reasons

columns = own_columns(plan.spec, model.settings)
assert columns.field("style").type == pa.string() and columns.field("repeats").type == pa.int32()
assert "style" not in own_columns(plan.spec, MODEL.settings).names
assert _MEANINGS["style"] == "words after each prompt"
assert applying(plan)["style"] == "in oil"
"""


def test_a_text_and_a_number_need_no_more_than_their_four_files(tmp_path: Path) -> None:
    assert len(EDITS) == 4
    run = run_edited(edited_package(tmp_path), NEW, str(tmp_path))
    assert run.returncode == 0, run.stderr
