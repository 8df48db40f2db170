"""The dataset card says how images were chosen, what varies, licences, and known limits."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from batchgen.cli import main
from batchgen.curate.copies import Ask, find_copies
from batchgen.output.export import export
from batchgen.output.ledger import Ledger
from batchgen.output.ranges import ranges_of, widened
from batchgen.output.restrict import Chosen
from batchgen.output.tally import Tally
from batchgen.report import refresh_card
from batchgen.report.card_sections import model_licence
from batchgen.report.finalize import finalize
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for
from tests.pictured_outputs import image_set, textures


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Twelve samples with a drawn guidance scale and a class, and their card."""
    table = pa.table(
        {
            "prompt": [f"p{number}" for number in range(12)],
            "guidance_scale": [1.0 + number % 4 for number in range(12)],
            "level": pa.array(range(12), pa.int64()),
            "kind": ["cat", "dog"] * 6,
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    dotted = {
        "output__samples_per_shard": 5,
        "output__license": "cc-by-4.0",
        "input__columns__label": "kind",
        "input__columns__guidance_scale": "guidance_scale",
    }
    plan = plan_for(tmp_path / "in.parquet", tmp_path / "out", **dotted)
    made = Ledger(open_store(plan.spec.output.url))
    make_output(plan, made)
    parts = made.parts()
    finalize(parts, made, Tally(parts.shards, parts.samples))
    return made


def card(ledger: Ledger) -> str:
    return ledger.store.read("README.md").decode()


def section(ledger: Ledger, head: str) -> str:
    return card(ledger).partition(f"## {head}\n")[2].partition("\n## ")[0]


def test_the_card_has_drawn_ranges_licences_filters_and_limits(ledger: Ledger) -> None:
    varying = section(ledger, "Values that vary")
    assert r"| guidance\_scale | 1 | 4 |" in varying and "| level | 0 | 11 |" in varying
    assert "steps" not in varying  # it is the same everywhere
    made = section(ledger, "How they were generated")
    assert "| licence of the images, as given | cc-by-4.0 |" in made
    assert "| licence of the model, as its card says | not stated |" in made
    assert r"| flat-image | policy.reject\_flat: true |" in section(ledger, "Filters that reject")
    assert "| cat | 6 |" in section(ledger, "Labels")
    limits = section(ledger, "Known limits")
    assert "Labels are what was asked for" in limits and "`batchgen eval`" in limits


def test_a_selection_and_an_evaluation_are_on_the_card_once_they_are_made(ledger: Ledger) -> None:
    assert "## Selections" not in card(ledger)
    args = ["select", ledger.store.url, "--name", "high", "--where", "level >= 7"]
    assert CliRunner().invoke(main, args).exit_code == 0
    assert "| high | level &gt;= 7 | 12 | 5 |" in section(ledger, "Selections")
    told = {"name": "first", "verdict": "No benefit is shown: +0.1 points."}
    ledger.store.put("_batchgen/evaluations/first.json", json.dumps(told).encode())
    refresh_card(ledger)
    assert "| first | No benefit is shown: +0.1 points. |" in section(ledger, "Evaluations")
    assert "`batchgen eval`" not in section(ledger, "Known limits")
    assert "| high |" in section(ledger, "Selections")


def test_only_a_comparison_with_training_images_says_that_copies_were_looked_for(
    ledger: Ledger, tmp_path: Path
) -> None:
    limit = "copy images of the model's training data"
    assert limit in section(ledger, "Known limits")
    told = {"name": "first", "verdict": "No benefit is shown: +0.1 points."}
    ledger.store.put("_batchgen/evaluations/first.json", json.dumps(told).encode())
    sets = [str(image_set(tmp_path / f"{seed}.parquet", textures(4, seed))) for seed in (1, 2)]
    assert find_copies(ledger, Ask(name="held", against=(sets[0],))).name == "held"
    refresh_card(ledger)
    assert limit in section(ledger, "Known limits")
    find_copies(ledger, Ask(name="seen", training=sets[1]))
    refresh_card(ledger)
    limits = section(ledger, "Known limits")
    assert limit not in limits and "A model made the images." in limits


def test_a_card_of_somebody_else_is_left_alone(ledger: Ledger) -> None:
    ledger.store.put("README.md", b"# mine\n")
    refresh_card(ledger)
    assert card(ledger) == "# mine\n"


def test_damaged_records_are_left_out(ledger: Ledger) -> None:
    for number, data in enumerate((b"{", b"[1]", b'{"name": "x", "query": 3}')):
        ledger.store.put(f"_batchgen/selections/{number}.json", data)
    refresh_card(ledger)
    assert "| x |  | None | None |" in section(ledger, "Selections")


def test_a_copy_of_a_selection_has_its_own_ranges(ledger: Ledger, tmp_path: Path) -> None:
    table = pq.read_table(tmp_path / "out" / "data")
    keys = table.filter(pa.compute.field("level") >= 9).column("key").to_pylist()
    copy = Ledger(open_store(str(tmp_path / "copy")))
    export(ledger, copy.store, "webdataset", Chosen("late", frozenset(keys)))
    parts = copy.parts()
    finalize(parts, copy, Tally(parts.shards, parts.samples))
    assert "| level | 9 | 11 |" in section(copy, "Values that vary")


def test_the_licence_of_a_model_is_read_from_its_card(tmp_path: Path) -> None:
    assert model_licence(str(tmp_path)) == "not stated"
    readme = tmp_path / "README.md"
    for text, expected in (
        ("---\nlicense: openrail++\n---\n# x\n", "openrail++"),
        ("---\nlicense: [\n---\n", "not stated"),
        ("# no head\n", "not stated"),
        ("---\n- a\n---\n", "not stated"),
    ):
        readme.write_text(text)
        assert model_licence(str(tmp_path)) == expected
    (tmp_path / "model.safetensors").touch()
    readme.write_text("---\nlicense: mit\n---\n")
    assert model_licence(str(tmp_path / "model.safetensors")) == "mit"


numbers = st.lists(st.floats() | st.none(), min_size=1, max_size=8)


@given(numbers, numbers)
def test_ranges_of_two_shards_are_those_of_one(first: list[float], second: list[float]) -> None:
    def table(values: list[float]) -> pa.Table:
        return pa.table({"x": pa.array(values, pa.float64()), "seed": range(len(values))})

    both = widened(ranges_of(table(first)), ranges_of(table(second)))
    assert both == ranges_of(table(first + second))
    assert "seed" not in both
