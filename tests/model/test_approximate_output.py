"""An output that was made approximately says so: rows, markers, card, plan; and it verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchgen import models
from batchgen.cli import main
from batchgen.models.memory_measure import measure
from batchgen.output.ledger import Ledger
from batchgen.output.marker import Marker
from batchgen.output.tally import Tally
from batchgen.output.verify import verify
from batchgen.plan.call_settings import usual_call
from batchgen.plan.plan import make_plan
from batchgen.report.card import card_of
from batchgen.report.digest import Digest
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from batchgen.storage import open_store
from tests.in_process import stream
from tests.outputs import digests_of, table_of
from tests.tiny_models import build_model

LABEL = "guidance_interval 0.25-0.75; deep_cache cache_interval=2"
APPROXIMATE = {"guidance_interval": [0.25, 0.75], "deep_cache": {"cache_interval": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("approximate")
    build_model(root / "tiny")
    rows = [
        {"id": f"row{number}", "prompt": ("a red star", "seven")[number % 2], "scale": scale}
        for number, scale in enumerate((3.0, 1.0, 3.0, 2.0, 3.0))
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
    return root


def spec_of(folder: Path, output: str, approximate: Any, **resources: Any) -> Spec:
    columns = {"prompt": "prompt", "key": "id", "guidance_scale": "scale"}
    return build(
        {
            "input": {"path": str(folder / "rows.parquet"), "columns": columns},
            "model": {"path": str(folder / "tiny"), "dtype": "float32"},
            "sampling": {"num_inference_steps": 6, "approximate": approximate},
            "output": {"url": str(folder / output), "samples_per_shard": 3},
            "resources": {"batch_size": 2, **resources},
        }
    )


@pytest.fixture(scope="module")
def markers(folder: Path) -> list[Any]:
    return list(stream(spec_of(folder, "fast", APPROXIMATE)))


def test_rows_and_markers_name_the_modes(folder: Path, markers: list[Any]) -> None:
    assert set(table_of(folder / "fast")["approximate"].to_pylist()) == {LABEL}
    for marker in markers:
        assert isinstance(marker, Marker)
        assert marker.environment["approximate"] == LABEL
    findings = verify(Ledger(open_store(str(folder / "fast"))))
    assert findings.ok, findings.problems
    staged = list(stream(spec_of(folder, "staged", APPROXIMATE, layout="staged")))
    assert len(staged) == 2 and digests_of(folder / "staged") == digests_of(folder / "fast")


def test_exact_outputs_have_no_such_column(folder: Path, markers: list[Any]) -> None:
    (first, *_) = stream(spec_of(folder, "exact", None))
    assert isinstance(first, Marker) and "approximate" not in first.environment
    assert "approximate" not in table_of(folder / "exact").column_names
    exact, fast = digests_of(folder / "exact"), digests_of(folder / "fast")
    assert [exact[key] == fast[key] for key in sorted(exact)] == [False] * 5


def test_other_shards_and_neighbours_give_the_same_bytes(folder: Path, markers: list[Any]) -> None:
    spec = spec_of(folder, "cut", APPROXIMATE)
    cut = spec.output.model_copy(update={"samples_per_shard": 2})
    list(stream(spec.model_copy(update={"output": cut})))
    assert digests_of(folder / "cut") == digests_of(folder / "fast")


def test_the_card_and_the_plan_tell_papers_and_costs(folder: Path) -> None:
    spec = spec_of(folder, "fast", APPROXIMATE)
    plan = make_plan(spec, models.inspect(spec.model, spec.task))
    card = card_of(plan, Tally(2, 5), Digest(), [], None)
    assert "approximate: guidance\\_interval 0.25-0.75 | Kynkäänniemi et al. 2024" in card
    assert (
        "measured cost of deep\\_cache | deep\\_cache cache\\_interval=3 on digits-shapes" in card
    )
    assert "how sampling was made faster" in card
    job = folder / "job.yaml"
    job.write_text(spec.to_yaml())
    told = CliRunner().invoke(main, ["plan", str(job)]).stdout
    assert "approximate: deep_cache cache_interval=2: Ma et al. 2023, arXiv:2312.00858" in told


def test_what_modes_keep_is_counted_as_memory(folder: Path) -> None:
    needs: dict[str, int] = {}
    for name, approximate in (("exact", None), ("deep", {"deep_cache": {"cache_interval": 3}})):
        spec = spec_of(folder, name, approximate)
        info = models.inspect(spec.model, spec.task)
        planned = make_plan(spec, info).spec
        needs[name] = (
            measure(info, planned, usual_call(planned, info)).stages["denoise"].image_bytes
        )
    assert needs["deep"] > needs["exact"]
