"""A resume may lower the sizes of calls; the plan and its fingerprint stay the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchgen.errors import SpecError
from batchgen.plan.choices import keep_choices
from batchgen.plan.saved import compare, read_plan
from batchgen.plan.sizes import as_planned, lowered, resized
from batchgen.spec.sections import Resources
from tests.datasets_on_disk import paper_plan, spec_for

EIGHT = Resources(batch_size=8)
FOUR_AT_ONCE = Resources(batch_size=8, decode_batch_size=4)


@pytest.mark.parametrize(
    ("planned", "batch", "decode", "sizes"),
    [
        (EIGHT, None, None, (8, None, 8)),
        (EIGHT, 4, None, (4, None, 4)),
        (EIGHT, None, 1, (8, 1, 1)),
        (EIGHT, 8, 8, (8, 8, 8)),
        (FOUR_AT_ONCE, None, None, (8, 4, 4)),
        (FOUR_AT_ONCE, 2, None, (2, 2, 2)),
        (FOUR_AT_ONCE, 2, 1, (2, 1, 1)),
    ],
)
def test_sizes_can_be_lowered(
    planned: Resources,
    batch: int | None,
    decode: int | None,
    sizes: tuple[int, int | None, int],
) -> None:
    job = spec_for("in").model_copy(update={"resources": planned})
    found = lowered(job, planned, batch, decode).resources
    assert (found.batch_size, found.decode_batch_size, found.decode_size) == sizes


@pytest.mark.parametrize(
    ("planned", "batch", "decode", "field"),
    [
        (EIGHT, 9, None, "resources.batch_size"),
        (EIGHT, 0, None, "resources.batch_size"),
        (EIGHT, None, 9, "resources.decode_batch_size"),
        (EIGHT, 4, 5, "resources.decode_batch_size"),
        (EIGHT, None, 0, "resources.decode_batch_size"),
        (FOUR_AT_ONCE, None, 5, "resources.decode_batch_size"),
    ],
)
def test_sizes_cannot_be_raised(
    planned: Resources, batch: int | None, decode: int | None, field: str
) -> None:
    job = spec_for("in").model_copy(update={"resources": planned})
    with pytest.raises(SpecError) as caught:
        lowered(job, planned, batch, decode)
    assert caught.value.field == field and "a resume cannot raise it" in caught.value.allowed


@pytest.mark.parametrize("now", [Resources(batch_size=16), EIGHT])
def test_a_job_file_that_was_edited_to_larger_calls_is_refused(now: Resources) -> None:
    job = spec_for("in").model_copy(update={"resources": now})
    with pytest.raises(SpecError, match="a resume cannot raise it"):
        lowered(job, FOUR_AT_ONCE, None, None)


def test_sizes_that_were_chosen_for_the_gpu_can_be_lowered() -> None:
    job = spec_for("in")
    assert (job.resources.batch_size, job.resources.decode_batch_size) == ("auto", None)
    kept = lowered(job, EIGHT, None, None).resources
    assert (kept.batch_size, kept.decode_batch_size) == ("auto", None)
    fewer = lowered(job, EIGHT, 4, None).resources
    assert (fewer.batch_size, fewer.decode_batch_size) == (4, None)
    fewer = lowered(job, FOUR_AT_ONCE, 6, None).resources
    assert (fewer.batch_size, fewer.decode_batch_size) == (6, 4)
    fewer = lowered(job, FOUR_AT_ONCE, None, 1)
    plan = read_plan(paper_plan([[4]], resources__batch_size=8).to_json())
    used = resized(plan, keep_choices(fewer, plan).resources).spec.resources
    assert (used.batch_size, used.decode_batch_size) == (8, 1)
    with pytest.raises(SpecError, match="a resume cannot raise it"):
        lowered(job, FOUR_AT_ONCE, None, 5)


def test_an_earlier_resume_is_continued() -> None:
    job = spec_for("in").model_copy(update={"resources": Resources(batch_size=2)})
    assert lowered(job, EIGHT, None, None).resources.batch_size == 2
    assert lowered(job, EIGHT, 8, None).resources.batch_size == 8, "back to the planned size"


def test_the_plan_keeps_its_fingerprint() -> None:
    plan = paper_plan([[4]])
    saved = read_plan(plan.to_json())
    asked = lowered(saved.spec, saved.spec.resources, 2, 1)
    again = replace(plan, spec=as_planned(asked, saved.spec))
    continued = compare(saved, again)
    used = resized(continued, asked.resources)
    assert used.fingerprints == plan.fingerprints
    assert (used.spec.resources.batch_size, used.spec.resources.decode_size) == (2, 1)
    fresh = resized(plan, asked.resources)
    assert fresh.fingerprints == plan.fingerprints
    assert as_planned(asked, None) is asked
