"""The plan: arithmetic of shards, rows and files, keys, and what resume refuses."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.errors import DamagedRecord, NewerFormat, PlanChanged
from batchgen.plan.keys import row_key, safe_key
from batchgen.plan.plan import Plan, plan_fingerprint, settle
from batchgen.plan.saved import compare, read_plan
from batchgen.spec.build import build
from batchgen.spec.spec import result_fields, spec_fingerprint
from batchgen.spec.tree import canonical_json, merge
from tests.datasets_on_disk import (
    MODEL,
    paper_plan,
    plan_for,
    spec_for,
    write_columns,
    write_prompts,
)

layouts = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5).filter(
    lambda files: sum(map(sum, files)) > 0
)
sizes = st.integers(1, 12)


@given(layouts, sizes, sizes)
def test_shards_partition_the_samples(files: list[list[int]], variants: int, size: int) -> None:
    plan = paper_plan(files, variants=variants, output__samples_per_shard=size)
    ranges = [plan.sample_range(shard) for shard in range(plan.shards)]
    samples = [sample for first, stop in ranges for sample in range(first, stop)]
    assert samples == list(range(plan.rows * variants))
    assert all(stop - first == size for first, stop in ranges[:-1])
    assert 0 < ranges[-1][1] - ranges[-1][0] <= size


@given(layouts, sizes, sizes)
def test_row_range_holds_exactly_the_rows_of_its_samples(
    files: list[list[int]], variants: int, size: int
) -> None:
    plan = paper_plan(files, variants=variants, output__samples_per_shard=size)
    for shard in range(plan.shards):
        rows = {sample // variants for sample in range(*plan.sample_range(shard))}
        assert rows == set(range(*plan.row_range(shard)))


@given(layouts)
def test_locate_counts_through_the_files(files: list[list[int]]) -> None:
    plan = paper_plan(files)
    expected = [(file.name, row) for file in plan.files for row in range(file.rows)]
    assert [(file.name, row) for file, row in map(plan.locate, range(plan.rows))] == expected


def test_a_plan_of_a_billion_rows_is_small() -> None:
    plan = paper_plan([[500_000_000], [500_000_000]], variants=3, output__samples_per_shard=64)
    assert plan.shards == 46_875_000
    assert plan.locate(999_999_999)[1] == 499_999_999
    assert len(plan.to_json()) < 10_000


names = st.text(max_size=120)


@given(names)
@example("")
@example("../../etc/passwd")
@example("a.b\x00c")
@example("-" * 200)
def test_a_safe_key_can_be_a_file_name(value: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,140}", safe_key(value))


@given(names, names)
def test_two_values_never_meet_in_one_safe_key(one: str, other: str) -> None:
    if one != other:
        assert safe_key(one) != safe_key(other)


@given(names)
@example("a b")
@example("")
def test_a_value_that_looks_like_a_cleaned_key_does_not_meet_it(value: str) -> None:
    cleaned = safe_key(value)
    if cleaned != value:
        assert safe_key(cleaned) != cleaned


@given(st.text("ab./ é-_", max_size=8), st.text("ab./ é-_", max_size=8))
def test_short_unsafe_keys_stay_apart(one: str, other: str) -> None:
    assert (safe_key(one) == safe_key(other)) == (one == other)


def test_long_keys_differ_after_their_first_hundred_letters() -> None:
    keys = {safe_key("x" * 100), safe_key("x" * 101), safe_key("x" * 100 + "y")}
    assert len(keys) == 3


def test_a_safe_value_is_its_own_key() -> None:
    assert [safe_key(value) for value in ("7", "a_b-C", "x" * 100)] == ["7", "a_b-C", "x" * 100]


def test_row_keys_tell_file_and_row_alone() -> None:
    assert row_key("train.parquet", 3) == "train-00000003"
    assert row_key("train.parquet", 10**9) == "train-1000000000"
    nested = {row_key("a/b.parquet", 0), row_key("a-b.parquet", 0), row_key("a_b.parquet", 0)}
    assert len(nested) == 3


def test_settings_left_open_come_from_the_model() -> None:
    spec = settle(spec_for("in", sampling__width=64, sampling__guidance_scale=0.0), MODEL)
    sampling = spec.sampling
    assert (sampling.num_inference_steps, sampling.height) == (5, 8)
    assert (sampling.width, sampling.guidance_scale) == (64, 0.0)


def test_json_round_trip(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 7, groups=[3, 4])
    write_prompts(tmp_path / "b.parquet", 2)
    plan = plan_for(tmp_path, variants=2, input__limit=8, output__samples_per_shard=3)
    again = read_plan(plan.to_json())
    assert again == plan
    assert again.fingerprints == plan.fingerprints
    assert (again.rows, again.samples, again.shards) == (8, 16, 6)
    compare(again, plan)


def test_a_plan_of_another_version_is_refused() -> None:
    tree = json.loads(paper_plan([[1]]).to_json())
    with pytest.raises(
        NewerFormat, match=r"newer batchgen \(format 99; this version reads up to 2\)"
    ):
        read_plan(json.dumps({**tree, "version": 99, "rows": "elsewhere"}))
    with pytest.raises(DamagedRecord, match=r"written by an older batchgen \(format 1"):
        read_plan(json.dumps({**tree, "version": 1}))


def edited(*path: str | int, value: object) -> str:
    """A plan of 9 rows as JSON, with another value at a place."""
    tree = json.loads(replace(paper_plan([[4, 4], [1]], input__limit=8), rows=8).to_json())
    place = tree
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("spec", "seed"), 7, "its spec does not match its spec_fingerprint"),
        (("spec", "sampling", "eta"), 0.5, "its spec does not match its spec_fingerprint"),
        (("spec_fingerprint",), "0" * 64, "its spec does not match its spec_fingerprint"),
        (("files", 0, "row_groups"), [8], "its files and columns do not"),
        (("files", 1, "etag"), "x", "its files and columns do not"),
        (("columns", 0, 1), "int64", "its files and columns do not"),
        (
            ("model", "manifest_sha256"),
            "e" * 64,
            "its model or place does not match its plan_fingerprint",
        ),
        (("plan_fingerprint",), "e" * 64, "its model or place does not match its plan_fingerprint"),
        (("rows",), 9, "its files and limit give 8 rows, but it says 9"),
        (("rows",), 2**70, r"rows: should be less than or equal to"),
        (("rows",), "x", "rows: should be a valid integer"),
        (("model",), None, "model: "),
        (("files",), [], "its files and columns do not"),
        (("files", 0, "row_groups"), {}, r"files\.0\.row_groups: should be a valid"),
        (("spec",), {}, "its spec: "),
        (("spec", "policy"), 5, "its spec: "),
        (("spec", "output"), "out", "its spec does not match its spec_fingerprint"),
    ],
)
def test_a_plan_that_was_changed_is_damaged(
    path: tuple[str | int, ...], value: object, why: str
) -> None:
    with pytest.raises(
        DamagedRecord, match=rf"(?s)^the plan is damaged \({why}.*restore an undamaged copy"
    ):
        read_plan(edited(*path, value=value))


def test_a_plan_without_a_fingerprint_of_the_whole_has_the_one_that_follows() -> None:
    plan = paper_plan([[4, 4], [1]])
    old = json.loads(plan.to_json())
    del old["plan_fingerprint"]
    again = read_plan(json.dumps(old))
    assert again == plan and again.fingerprints == plan.fingerprints


def test_a_spec_with_fields_of_another_version_keeps_its_fingerprint() -> None:
    """A later version has more fields, an earlier one fewer; neither changes the plan."""
    tree = json.loads(PLAN.to_json())
    for change in ("more", "fewer"):
        if change == "more":
            tree["spec"]["sampling"]["sharpness"] = 3
        else:
            del tree["spec"]["sampling"]["sharpness"], tree["spec"]["sampling"]["eta"]
        written = canonical_json(result_fields(tree["spec"])).encode()
        tree["spec_fingerprint"] = hashlib.sha256(written).hexdigest()
        del tree["input_fingerprint"], tree["plan_fingerprint"]
        tree["input_fingerprint"] = PLAN.fingerprints.input
        tree["plan_fingerprint"] = plan_fingerprint(
            tree["spec_fingerprint"], tree["input_fingerprint"], PLAN.model
        )
        plan = read_plan(json.dumps(tree))
        assert plan.fingerprint == tree["plan_fingerprint"] != PLAN.fingerprint
        if change == "fewer":
            assert compare(plan, PLAN).fingerprint == plan.fingerprint
            continue
        with pytest.raises(
            NewerFormat, match=r"newer batchgen, with fields .* \(sampling\.sharpness\)"
        ):
            compare(plan, PLAN)


def fingerprinted(tree: dict[str, Any], spec: dict[str, Any]) -> str:
    """The plan with its fingerprints computed over ``spec``, as the version that wrote it would."""
    found = spec_fingerprint(spec)
    whole = plan_fingerprint(found, tree["input_fingerprint"], PLAN.model)
    return json.dumps({**tree, "spec_fingerprint": found, "plan_fingerprint": whole})


def test_a_later_version_may_have_fields_that_change_no_image_and_others_that_do() -> None:
    tree = json.loads(PLAN.to_json())
    before = dict(tree["spec"])
    tree["spec"]["policy"] = {**before["policy"], "patience": 3}
    free = read_plan(fingerprinted(tree, before))
    assert free.fingerprint == PLAN.fingerprint and free.frozen is not None
    assert free.frozen.unknown == ("policy.patience",)
    tree["spec"]["sampling"] = {**before["sampling"], "sharpness": 3}
    both = {**before, "sampling": tree["spec"]["sampling"]}
    with pytest.raises(
        NewerFormat, match=r"a newer batchgen, with fields .* \(policy\.patience, sampling"
    ):
        read_plan(fingerprinted(tree, both))


PLAN = paper_plan([[4, 4], [5]])


def with_spec(dotted: dict[str, Any]) -> Plan:
    return replace(PLAN, spec=build(merge(PLAN.spec.model_dump(mode="json"), dotted)))


def with_file(index: int, **facts: Any) -> Plan:
    files = list(PLAN.files)
    files[index] = replace(files[index], **facts)
    return replace(PLAN, files=tuple(files))


@pytest.mark.parametrize(
    ("now", "field", "before", "after"),
    [
        (with_spec({"seed": 5}), "seed", "0", "5"),
        (with_spec({"variants": 2}), "variants", "1", "2"),
        (with_spec({"input.limit": 3}), "input.limit", "None", "3"),
        (with_spec({"sampling.eta": 0.5}), "sampling.eta", "0.0", "0.5"),
        (with_spec({"model.path": "x/y"}), "model.path", "'digits-shapes'", "'x/y'"),
        (
            with_spec({"input.columns.label": "kind"}),
            "input.columns.label",
            "None",
            "'kind'",
        ),
        (
            with_spec({"output.samples_per_shard": 9}),
            "output.samples_per_shard",
            "64",
            "9",
        ),
        (with_spec({"resources.batch_size": 2}), "resources.batch_size", "8", "2"),
        (with_file(0, size=101), "input file /in/0.parquet: size", "100", "101"),
        (with_file(1, etag="new"), "input file /in/1.parquet: etag", "'tag'", "'new'"),
        (
            with_file(0, row_groups=(4, 5)),
            "input file /in/0.parquet: row_groups",
            "(4, 4)",
            "(4, 5)",
        ),
        (replace(PLAN, files=PLAN.files[:1]), "input file /in/1.parquet", "'present'", "None"),
        (paper_plan([[4, 4], [5], [1]]), "input file /in/2.parquet", "None", "'present'"),
        (
            replace(PLAN, model=replace(MODEL, manifest_sha256="0" * 64)),
            "model weights",
            "'" + "f" * 64 + "'",
            "'" + "0" * 64 + "'",
        ),
        (
            replace(PLAN, columns=(("prompt", "large_string"),)),
            "input columns",
            "string",
            "large_string",
        ),
    ],
)
def test_compare_names_the_field_and_both_values(
    now: Plan, field: str, before: str, after: str
) -> None:
    with pytest.raises(PlanChanged) as caught:
        compare(PLAN, now)
    message = str(caught.value)
    assert message.startswith(f"{field} has changed: ")
    values = rf"planned with .*{re.escape(before)}.*, now it is .*{re.escape(after)}"
    assert re.search(values, message)
    assert "change it back, or write to a new output" in message


def test_compare_lets_pass_what_does_not_change_the_images() -> None:
    compare(PLAN, PLAN)
    other = {"resources.layout": "staged", "policy.shard_retries": 9, "output.license": "mit"}
    compare(PLAN, with_spec(other))


def test_planning_again_gives_the_same_plan(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 3)
    first, again = plan_for(tmp_path), plan_for(tmp_path)
    assert first == again
    compare(first, again)


def test_a_file_written_again_is_refused(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 3)
    first = plan_for(tmp_path)
    write_columns(path, {"prompt": ["other", "rows", "here"], "number": [7, 8, 9]})
    with pytest.raises(PlanChanged, match=re.escape(f"input file {path}: ")):
        compare(first, plan_for(tmp_path))


def test_a_new_file_in_the_folder_is_refused(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 3)
    first = plan_for(tmp_path)
    added = write_prompts(tmp_path / "b.parquet", 1)
    with pytest.raises(PlanChanged, match=re.escape(f"input file {added} has changed")):
        compare(first, plan_for(tmp_path))


def test_the_plan_that_actors_get_has_the_same_fingerprint(
    prompts: Callable[..., Path], tmp_path: Path
) -> None:
    """Otherwise a run's own markers would seem to belong to another plan."""
    plan = plan_for(prompts(4), tmp_path / "out")
    light = plan.without_files()
    assert not light.files and light.fingerprints == plan.fingerprints
    assert light.without_files() == light
