"""An output of several parts: samples are numbered through, old files stay as they are."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.curate.selection import Query, select, selected_keys
from batchgen.errors import DamagedRecord, InputError, OutputBusy, PlanChanged, SpecError
from batchgen.input.reader import make_spans, read_columns, read_span, span_from_json
from batchgen.output.datasets.choose import export_to
from batchgen.output.export import export
from batchgen.output.extension import Extension, extend, further_parts
from batchgen.output.find import contents, find_sample, shard_of
from batchgen.output.formats import format_of
from batchgen.output.ledger import Ledger, listing_name
from batchgen.output.planned import names_of
from batchgen.output.rejects import by_reason
from batchgen.output.repair import repair
from batchgen.output.tally import Tally
from batchgen.output.verify import verify
from batchgen.plan.extend import listed_part, more_rows, more_variants, next_variant, rows_of
from batchgen.plan.parts import Parts, planned_twice
from batchgen.plan.plan import Plan
from batchgen.plan.saved import compare, read_plan
from batchgen.report.finalize import finalize
from batchgen.shard.prepare import prepare
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output, make_parts
from tests.datasets_on_disk import plan_for, write_columns, write_prompts

FORMATS = ("parquet", "webdataset", "image-folder")
Sample = tuple[int, int]  # row, variant


def keys_read(plan: Plan) -> list[str]:
    """The keys of a part, as a run prepares them from the rows that it reads."""
    columns = read_columns(plan.spec, [name for name, _ in plan.columns])
    found = {}
    for span in make_spans(plan, plan.numbers, 3):
        for rows in read_span(span_from_json(span.to_json()), plan.spec, columns):
            samples = prepare(rows, plan.without_files()).samples
            assert len(samples) == rows.stop_sample - rows.first_sample
            texts = rows.table.column("prompt").to_pylist()
            assert [texts[one.row] for one in samples] == [one.prompt for one in samples]
            found[rows.shard] = [one.key for one in samples]
    assert sorted(found) == list(plan.numbers)
    return [key for shard in plan.numbers for key in found[shard]]


def keys_named(plan: Plan, shard: int) -> list[str]:
    """The keys of a shard, as verification computes them."""
    keys = names_of(plan, shard).keys
    assert keys is not None
    found: list[str] = keys.to_pylist()
    return found


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, list[int]]]:
    kinds = st.sampled_from(["variants", "limit", "listed"])
    return draw(
        st.lists(
            st.tuples(kinds, st.integers(1, 4), st.lists(st.integers(0, 30), max_size=9)),
            max_size=5,
        )
    )


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    limit=st.integers(1, 12),
    variants=st.integers(1, 3),
    size=st.integers(1, 5),
    steps=steps(),
)
def test_every_sample_is_numbered_once(
    groups: list[int], limit: int, variants: int, size: int, steps: list[Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder) / "a.parquet", sum(groups), groups=groups)
        write_prompts(Path(folder) / "b.parquet", 3)
        total = sum(groups) + 3
        dotted = {"output__samples_per_shard": size, "variants": variants}
        first = plan_for(folder, f"{folder}-out", input__limit=limit, **dotted)
        parts = Parts([first])
        rows = min(total, limit)
        expected: list[set[Sample]] = [{(r, v) for r in range(rows) for v in range(variants)}]
        for kind, count, listed in steps:
            if kind == "limit" and rows == total:
                with pytest.raises(InputError, match="all rows of its input already"):
                    more_rows(parts, count)
                continue
            start = next_variant(parts, 0)
            assert start == 1 + max(variant for one in expected for _, variant in one)
            if kind == "variants":
                (plan,) = more_variants(parts, count)
                expected.append({(r, start + v) for r in range(rows) for v in range(count)})
            elif kind == "limit":
                (plan,) = more_rows(parts, count)
                dense = [one for one in parts if not one.place.listed and not one.place.first_row]
                each = sum(one.spec.variants for one in dense)
                new = range(rows, min(total, rows + count))
                expected.append({(r, v) for r in new for v in range(each)})
                rows = new.stop
            else:
                chosen = [row for row in listed if row < rows] or [0]
                seen = Counter[int]()
                wanted = []
                for row in chosen:
                    wanted.append((row, start + seen[row], -1))
                    seen[row] += 1
                plan = listed_part(parts, 0, wanted, "quota")
                expected.append({(row, variant) for row, variant, _ in wanted})
            parts = Parts([*parts, plan])
        check(parts, expected, size)


def check(parts: Parts, expected: list[set[Sample]], size: int) -> None:
    """Compare numbering, names and reading with the samples that each part should have."""
    numbers = [shard for plan in parts for shard in plan.numbers]
    assert numbers == list(parts.numbers)
    assert parts.samples == sum(map(len, expected)) == parts.samples_in(parts.numbers)
    everything: list[str] = []
    for plan, samples in zip(parts, expected, strict=True):
        assert plan.place.first_sample == sum(map(len, expected[: plan.place.part]))
        again = read_plan(plan.to_json())
        assert again.fingerprints == plan.fingerprints and again.place == plan.place
        order = sorted(samples)
        keys = []
        for file, row, variant in ((*plan.locate(row), variant) for row, variant in order):
            keys.append(f"{file.name.removesuffix('.parquet')}-{row:08d}-v{variant}")
        named = [key for shard in plan.numbers for key in keys_named(plan, shard)]
        assert named == keys == keys_read(plan)
        for number, ((row, variant), key) in enumerate(zip(order, keys, strict=True)):
            assert plan.sample_at(row, variant) == number
            shard = plan.numbers.start + number // size
            assert parts.of(shard) is plan and shard_of(plan, key) == shard
            assert [one.place.part for one in parts if shard_of(one, key) is not None] == [
                plan.place.part
            ]
            first, stop = plan.row_range(shard)
            assert first <= row < stop
        everything += keys
    assert len(everything) == len(set(everything))
    assert planned_twice(parts) == ""


def output_of(folder: Path, form: str = "parquet", **dotted: Any) -> Ledger:
    """Six prompts, of which one gives a flat image and one is null; two of them are left out."""
    texts = ["a", "b flat", None, "d", "e", "f", "g", "h"]
    table = pa.table({"prompt": texts, "kind": ["cat", "dog"] * 4})
    pq.write_table(table, folder / "in.parquet")
    fields = {
        "output__format": form,
        "output__samples_per_shard": 4,
        "input__columns__label": "kind",
        "input__limit": 6,
        "resources__batch_size": 2,
        "policy__rejected_limit": 1.0,
    }
    plan = plan_for(folder / "in.parquet", folder / "out", **{**fields, **dotted})
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    return ledger


def files_of(ledger: Ledger) -> dict[str, str]:
    """The SHA-256 of every file of an output, except those that a run may replace."""
    changing = ("README.md", "_batchgen/report.html", "_batchgen/contact-sheet.png")
    return {
        name: hashlib.sha256(ledger.store.read(name)).hexdigest()
        for name in ledger.store.find("")
        if name not in changing and not name.startswith("_batchgen/lease/")
    }


def add(ledger: Ledger, **wanted: Any) -> list[Plan]:
    plans = further_parts(ledger, Extension(**wanted), ledger.job())
    extend(ledger, plans)
    make_parts(ledger)
    return plans


def keys_of(ledger: Ledger) -> dict[str, str]:
    """key -> sha256 of all accepted samples."""
    found: dict[str, str] = {}
    for plan in ledger.parts():
        for marker in ledger.markers(ledger.states(plan).committed):
            table = format_of(plan).read(dict(contents(ledger, marker)), ["key", "sha256"])
            pairs = dict(
                zip(*(table.column(one).to_pylist() for one in ("key", "sha256")), strict=True)
            )
            assert not pairs.keys() & found.keys()
            found |= pairs
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_an_extended_output_keeps_its_files_and_verifies(form: str, tmp_path: Path) -> None:
    ledger = output_of(tmp_path, form)
    before, samples = files_of(ledger), keys_of(ledger)
    write_columns(tmp_path / "more.parquet", {"prompt": ["x", "y"], "kind": ["cat", "fox"]})
    add(ledger, variants=2)
    add(ledger, limit=1)
    add(ledger, input=str(tmp_path / "more.parquet"))
    again = add(ledger, again="rejected")
    assert [one.place.why for one in ledger.parts()] == ["", "variants", "limit", "input", "again"]
    after = files_of(ledger)
    assert before == {name: after[name] for name in before}
    found = verify(ledger)
    assert found.ok, found.problems
    assert found.planned == 6 + 12 + 3 + 6 + 3 == ledger.parts().samples
    assert [one.samples for one in again] == [3]  # the flat image in three variants
    now = keys_of(ledger)
    assert samples.items() <= now.items() and len(now) == found.accepted
    outcome = finalize(ledger.parts(), ledger, Tally(1, 1))
    assert (outcome.exit_code, outcome.planned) == (0, 30)
    card = ledger.store.read("README.md").decode()
    assert "| 3 | rows of another input | 6 |" in card
    groups = {group.reason: group.count for group in by_reason(ledger)}
    assert groups == {"flat-image": 6, "null-prompt": 3}


def test_samples_of_all_parts_are_found_selected_and_exported(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    select(ledger, ledger.parts(), "old", Query("label = 'cat'"))
    old = selected_keys(ledger, ledger.parts(), "old")
    assert len(old) == 2
    add(ledger, variants=2)
    add(ledger, again="rejected")
    parts = ledger.parts()
    for key, digest in keys_of(ledger).items():
        assert find_sample(ledger, parts, key).row["sha256"] == digest
    assert selected_keys(ledger, parts, "old") == old  # its samples are still there
    assert select(ledger, parts, "cats", Query("label = 'cat'")).selected == 6
    target = Ledger(open_store(str(tmp_path / "copy")))
    assert export(ledger, target.store, "webdataset") == parts.shards
    assert verify(target).ok and keys_of(target) == keys_of(ledger)
    add(ledger, limit=2)
    assert export(ledger, target.store, "webdataset") == 2
    assert verify(target).ok and keys_of(target) == keys_of(ledger)


def test_a_damaged_shard_of_any_part_is_repaired(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    add(ledger, variants=2)
    add(ledger, again="rejected")
    before = keys_of(ledger)
    names = sorted(f"data/{name}" for name in ledger.store.find("data"))
    for name in (names[0], names[2], names[-1]):
        ledger.store.put(name, b"damaged")
    found = repair(ledger)
    assert found.withdrawn == (0, 2, 5)
    make_parts(ledger)
    assert verify(ledger).ok and keys_of(ledger) == before


def test_keys_of_an_input_are_unique_over_all_parts(tmp_path: Path) -> None:
    write_columns(tmp_path / "in.parquet", {"prompt": ["a", "b", "c"], "id": ["k1", "k2", "k3"]})
    write_columns(tmp_path / "more.parquet", {"prompt": ["d", "e"], "id": ["k4", "k2"]})
    write_columns(tmp_path / "good.parquet", {"prompt": ["d", "e"], "id": ["k4", "k5"]})
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", input__columns__key="id")
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    with pytest.raises(InputError, match=r"in.parquet row 1 and .*more.parquet row 1"):
        add(ledger, input=str(tmp_path / "more.parquet"))
    assert len(ledger.parts()) == 1
    add(ledger, input=str(tmp_path / "good.parquet"))
    add(ledger, variants=1)
    assert [plan.place.base for plan in ledger.parts()] == [0, 1, 0, 1]
    assert verify(ledger).ok
    keys = {f"k{number}-v{variant}" for number in range(1, 6) for variant in range(2)}
    assert set(keys_of(ledger)) == keys


def test_failed_samples_are_made_again_once(tmp_path: Path) -> None:
    write_columns(tmp_path / "in.parquet", {"prompt": ["a", "b broken"]})
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", variants=2)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    (part,) = add(ledger, again="failed")
    assert part.listed.rows.tolist() == [1, 1]
    assert part.listed.variants.tolist() == [2, 3]
    assert part.listed.instead_of.tolist() == [0, 1]
    (part,) = add(
        ledger, again="failed", reason="non-finite"
    )  # those of the last part, not again the first
    assert part.listed.instead_of.tolist() == [2, 3]
    with pytest.raises(InputError, match="no rejected sample to make again"):
        add(ledger, again="rejected")


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        ({"variants": 0}, SpecError, "--variants"),
        ({"variants": 1_000_000}, SpecError, "at most 999,999"),
        ({"limit": 0}, SpecError, "--limit"),
        ({"again": "accepted"}, SpecError, "rejected, failed"),
        ({"again": "rejected", "reason": "flat-imag"}, InputError, "did you mean 'flat-image'"),
        ({"again": "failed"}, InputError, "no failed sample"),
        ({"input": "nowhere.parquet"}, InputError, "nowhere.parquet"),
    ],
)
def test_what_cannot_be_added_is_refused(
    wanted: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    ledger = output_of(tmp_path)
    with pytest.raises(error, match=words):
        further_parts(ledger, Extension(**wanted), ledger.job())


def test_an_input_with_other_columns_is_refused(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    write_columns(tmp_path / "more.parquet", {"prompt": ["x"], "kind": [3]})
    with pytest.raises(InputError, match="column 'kind' is int64, but string"):
        further_parts(ledger, Extension(input=str(tmp_path / "more.parquet")), ledger.job())
    write_prompts(tmp_path / "in.parquet", 9)
    with pytest.raises(InputError, match=r"kind|has changed"):
        further_parts(ledger, Extension(limit=1), ledger.job())


def test_rows_without_an_input_are_numbered_on(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"input__count": 3, "task": "unconditional"}
    plan = plan_for("", tmp_path / "out", **fields)
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    add(ledger, limit=2)
    add(ledger, variants=1)
    assert verify(ledger).ok
    assert set(keys_of(ledger)) == {f"row-{row:08d}-v{one}" for row in range(5) for one in range(2)}


def test_two_processes_cannot_add_the_same_part(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    one, other = (
        further_parts(ledger, Extension(variants=count), ledger.job()) for count in (1, 2)
    )
    extend(ledger, one)
    with pytest.raises(OutputBusy, match=r"parts/0001.json meanwhile"):
        extend(ledger, other)
    assert ledger.parts()[1].spec.variants == 1


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    add(ledger, variants=1)
    (again,) = add(ledger, again="rejected")
    name = listing_name(again.place)
    kept = ledger.store.read(name)
    ledger.store.put(name, kept[:-1])
    with pytest.raises(DamagedRecord, match=f"{name} is damaged"):
        ledger.parts()
    ledger.store.delete(name)
    with pytest.raises(DamagedRecord, match=f"{name}, which .*0002.json names, is missing"):
        ledger.parts()
    ledger.store.put(name, kept)
    middle = ledger.store.read("_batchgen/parts/0001.json")
    ledger.store.delete("_batchgen/parts/0001.json")
    with pytest.raises(DamagedRecord, match=r"0002.json does not continue _batchgen/plan.json"):
        ledger.parts()
    ledger.store.put(
        "_batchgen/parts/0001.json", middle.replace(b'"first_shard": 2', b'"first_shard": 3')
    )
    with pytest.raises(DamagedRecord, match="place does not match its plan_fingerprint"):
        ledger.parts()


@pytest.mark.parametrize(
    ("change", "command"),
    [
        ({"variants": 4}, "--variants 3` adds them"),
        ({"input__limit": 8}, "--limit 2` adds rows"),
        ({"input__limit": None}, "--limit N` adds rows"),
    ],
)
def test_a_refused_change_names_the_command(
    change: dict[str, Any], command: str, tmp_path: Path
) -> None:
    ledger = output_of(tmp_path)
    fields = {"input__limit": 6, "input__columns__label": "kind", "output__samples_per_shard": 4}
    now = plan_for(
        tmp_path / "in.parquet",
        tmp_path / "out",
        **{**fields, "resources__batch_size": 2, **change},
    )
    with pytest.raises(PlanChanged, match=f"batchgen extend .*out {command}"):
        compare(ledger.require_plan(), now)


@pytest.mark.parametrize("form", FORMATS)
def test_old_and_new_files_are_loaded_together(form: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    ledger = output_of(tmp_path, form)
    add(ledger, variants=2)
    add(ledger, again="rejected")
    finalize(ledger.parts(), ledger, Tally(1, 1))
    keys = set(keys_of(ledger))
    front = yaml.safe_load(ledger.store.read("README.md").decode().split("---")[1])
    (config,) = front["configs"]
    files = {"train": str(tmp_path / "out" / config["data_files"])}
    builder = {"image-folder": "imagefolder"}.get(form, form)
    cache = str(tmp_path / "cache")
    for place, more in ((builder, {"data_files": files}), (str(tmp_path / "out"), {})):
        images = datasets.load_dataset(place, split="train", cache_dir=cache, **more)
        name = {"webdataset": "__key__"}.get(form, "key")
        assert set(images[name]) == keys


def test_labels_of_all_parts_are_exported(tmp_path: Path) -> None:
    table = pa.table(
        {"prompt": ["a", "b"], "objects": [[{"bbox": [0, 0, 4, 4], "category": 1}]] * 2}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", input__columns__objects="objects")
    ledger = Ledger(open_store(plan.spec.output.url))
    make_output(plan, ledger)
    add(ledger, variants=2)
    target = open_store(str(tmp_path / "coco"))
    totals = export_to(ledger, target, "coco", "empty")
    assert totals.splits == {"train": [6, 0]}

    name = next(
        name for name in target.find("") if name.endswith(".json") and "_batchgen" not in name
    )
    images = json.load(io.BytesIO(target.read(name)))["images"]
    assert sorted(one["id"] for one in images) == [1, 2, 3, 4, 5, 6]


def test_rows_of_counts_all_rows(tmp_path: Path) -> None:
    parts = output_of(tmp_path).parts()
    assert rows_of(parts, 0) == 6
    assert rows_of(Parts([*parts, *more_rows(parts, 5)]), 0) == 8
