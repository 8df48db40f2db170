"""What `batchgen extend` checks before it writes a part, and what an interrupted one leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchgen import runner
from batchgen.cli import main
from batchgen.engine import planning
from batchgen.engine.planning import extend_output, planned_parts
from batchgen.errors import BatchgenError, InputError, OutputBusy, PlanChanged
from batchgen.output.claim import claim
from batchgen.output.extension import Extension, extend, further_parts
from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger
from batchgen.spec.sections import MAX_COUNT
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from tests.datasets_on_disk import plan_for
from tests.outputs import spec_for


def planned(spec: Spec) -> Ledger:
    """An output that is planned for the shipped model; nothing is generated."""
    plan = runner.plan_job(spec)
    ledger = Ledger(open_store(plan.spec.output.url))
    ledger.freeze(plan, spec)
    return ledger


def output_of(folder: Path, rows: int = 6, **dotted: Any) -> Ledger:
    write(folder / "in.parquet", rows)
    return planned(spec_for(folder / "in.parquet", folder / "out", **dotted))


def write(path: Path, rows: int, names: list[str] | None = None) -> None:
    """Prompts, and classes as ClassLabel if ``names`` are given."""
    path.parent.mkdir(exist_ok=True, parents=True)
    table = pa.table({"prompt": [f"a circle {n}" for n in range(rows)], "kind": [0] * rows})
    if names:
        feature = f'{{"_type": "ClassLabel", "names": {names}}}'.replace("'", '"')
        told = f'{{"info": {{"features": {{"kind": {feature}}}}}}}'
        table = table.replace_schema_metadata({"huggingface": told})
    pq.write_table(table, path)


def parts_in(ledger: Ledger) -> list[str]:
    return sorted(ledger.store.list("_batchgen/parts"))


def test_extend_shows_the_part_and_writes_nothing(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    out = str(tmp_path / "out")
    shown = CliRunner().invoke(main, ["extend", out, "--variants", "3", "--plan-only"])
    assert shown.output == "part 1 (variants): 18 samples in shards 2:7: 3 variants of 6 rows\n"
    told = CliRunner().invoke(main, ["extend", out, "--variants", "1", "--plan-only", "--json"])
    assert '"samples": 6' in told.output and told.exit_code == 0
    assert parts_in(ledger) == []
    none = CliRunner().invoke(main, ["extend", out])
    assert none.exit_code and "one of --variants" in none.output
    both = CliRunner().invoke(main, ["extend", out, "--limit", "1", "--reason", "x"])
    assert "--reason needs --again" in both.output


def test_a_busy_output_gets_no_part(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    with hold_lease(ledger.store, lambda words: None), pytest.raises(OutputBusy):
        extend_output(ledger, Extension(variants=1), None)
    assert parts_in(ledger) == []
    assert len(extend_output(ledger, Extension(variants=1), None)) == 1


def test_an_extension_that_was_interrupted_between_two_parts_is_completed(tmp_path: Path) -> None:
    ledger = output_of(tmp_path)
    write(tmp_path / "more.parquet", 4)
    extend_output(ledger, Extension(input=str(tmp_path / "more.parquet")), None)
    plans = further_parts(ledger, Extension(variants=2), ledger.job())
    assert [(plan.place.base, plan.place.left) for plan in plans] == [(0, 1), (1, 0)]
    extend(ledger, plans[:1])  # here the process was killed

    parts = claim(ledger, ledger.require_plan(), ledger.job(), print, whole=True)
    assert [plan.fingerprint for plan in parts[2:]] == [plan.fingerprint for plan in plans]
    assert claim(ledger, ledger.require_plan(), ledger.job(), print, whole=True) == parts
    assert parts.samples == 6 + 4 + 2 * (6 + 4)


def test_an_input_with_other_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", 3, ["cat", "dog"])
    columns = {"input__columns__label": "kind"}
    ledger = planned(spec_for(tmp_path / "in.parquet", tmp_path / "out", **columns))
    for names, said in ((["dog", "cat"], "dog, cat"), (None, "not declared")):
        write(tmp_path / "more.parquet", 3, names)
        wanted = Extension(input=str(tmp_path / "more.parquet"))
        with pytest.raises(InputError, match=f"column 'kind' are {said}, but cat, dog"):
            planned_parts(ledger, wanted, None)
    write(tmp_path / "more.parquet", 3, ["cat", "dog"])
    assert len(planned_parts(ledger, wanted, None)) == 1


def labelled(path: Path, told: str) -> None:
    objects = [{"bbox": [[1.0, 1.0, 4.0, 4.0]], "category": [0]}]
    table = pa.table({"prompt": ["a circle"], "objects": objects})
    pq.write_table(table.replace_schema_metadata({"batchgen": told}), path)


@pytest.mark.parametrize("names", ["cat", "dog"])
def test_labels_of_an_added_input_come_from_it(names: str, tmp_path: Path) -> None:
    """Its own info and licences do not block the output; other categories are refused before."""
    told = '{"categories": [{"name": "%s"}], "source": {"info": {"description": "%s"}}}'
    labelled(tmp_path / "in.parquet", told % ("cat", "first"))
    columns = {"input__columns__objects": "objects"}
    ledger = planned(spec_for(tmp_path / "in.parquet", tmp_path / "out", **columns))
    labelled(tmp_path / "more.parquet", told % (names, "second"))
    wanted = Extension(input=str(tmp_path / "more.parquet"))
    if names == "dog":
        with pytest.raises(InputError, match="classes of the objects are dog, but cat"):
            planned_parts(ledger, wanted, None)
        return
    (plan,) = planned_parts(ledger, wanted, None)
    assert plan.spec.labels.source["info"] == {"description": "second"}


def test_two_files_with_the_same_keys_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "part-1" / "x.parquet", 2)
    ledger = planned(spec_for(tmp_path / "in", tmp_path / "out"))
    write(tmp_path / "x", 2)
    with pytest.raises(BatchgenError, match=r"same keys|no file"):
        planned_parts(ledger, Extension(input=str(tmp_path / "x")), None)


def test_an_input_or_a_model_that_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = output_of(tmp_path)
    write(tmp_path / "in.parquet", 7)
    with pytest.raises(InputError, match="has changed since the output was planned"):
        planned_parts(ledger, Extension(variants=1), None)
    write(tmp_path / "in.parquet", 6)
    ledger = planned(spec_for(tmp_path / "in.parquet", tmp_path / "other"))
    found = planning.inspect

    def others(*given: Any) -> Any:
        return replace(found(*given), manifest_sha256="0" * 64)

    monkeypatch.setattr(planning, "inspect", others)
    with pytest.raises(PlanChanged, match="model weights has changed"):
        planned_parts(ledger, Extension(variants=1), None)


def test_no_more_rows_than_a_spec_may_count(tmp_path: Path) -> None:
    plan = plan_for("", tmp_path / "out", input__count=6, task="unconditional")
    ledger = Ledger(open_store(plan.spec.output.url))
    ledger.freeze(plan, plan.spec)
    plans = further_parts(ledger, Extension(limit=2**53), plan.spec)
    extend(ledger, plans)
    assert ledger.parts()[1].spec.input.count == MAX_COUNT
