"""Rows with their own settings: batches stay full, and pixels equal runs with one setting each."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.output.marker import Marker
from batchgen.spec.build import build
from batchgen.spec.spec import Spec
from jobs.task_inputs import caption, drawn, png
from tests.added_files import build_lora
from tests.in_process import stream
from tests.outputs import digests_of, table_of
from tests.tiny_models import build_model

B = 3
# Every setting that a row may have, with two values; rows take them in every pairing of a few.
SETTINGS: dict[str, tuple[Any, Any]] = {
    "num_inference_steps": (3, 4),
    "guidance_scale": (1.0, 3.0),
    "strength": (0.5, 0.9),
    "width": (32, 48),
    "scheduler": ("DDIMScheduler", "EulerAncestralDiscreteScheduler"),
    "lora": ("ink:1", "ink:0.5,chalk:-1"),
}
ONE: dict[str, Any] = {name: values[0] for name, values in SETTINGS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section ``model``: a tiny Stable Diffusion with two LoRAs."""
    folder = build_model(tmp_path_factory.mktemp("models") / "tiny")
    loras = tmp_path_factory.mktemp("loras")
    named = [
        {"name": name, "path": str(build_lora(folder, loras / name, seed))}
        for seed, name in enumerate(("ink", "chalk"))
    ]
    return {"path": str(folder), "loras": named}


def rows() -> list[dict[str, Any]]:
    """Four rows for each way to change one setting, interleaved so that neighbours differ."""
    ways = [ONE, *({**ONE, name: values[1]} for name, values in SETTINGS.items())]
    found = []
    for number, (copy, way) in enumerate(itertools.product(range(4), ways)):
        found.append(
            {
                "id": f"row{number}",
                "prompt": caption(("star", "ring")[copy % 2], "red", "white"),
                "image": png(drawn("circle", "blue", ("yellow", "green")[copy // 2])),
                "seed": 1000 + number,
                **way,
            }
        )
    return found


def run(model: dict[str, Any], given: list[dict[str, Any]], folder: Path, by_row: bool) -> Path:
    """One run, with settings from each row's columns or, equal for all rows, from the spec."""
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(given), folder / "rows.parquet")
    columns = {"prompt": "prompt", "image": "image", "key": "id", "seed": "seed"}
    columns |= {name: name for name in SETTINGS} if by_row else {}
    stream(spec_of(model, columns, {} if by_row else given[0], folder))
    return folder / "out"


def spec_of(
    model: dict[str, Any], columns: dict[str, str], one: dict[str, Any], folder: Path
) -> Spec:
    sampling = {name: one[name] for name in SETTINGS if name in one and name != "scheduler"}
    chosen = {"scheduler": one["scheduler"]} if one else {}
    return build(
        {
            "task": "image-to-image",
            "input": {
                "path": str(folder / "rows.parquet"),
                "columns": columns,
                "keep_columns": [],
            },
            "model": {**model, **chosen},
            "sampling": sampling,
            "output": {"url": str(folder / "out"), "samples_per_shard": 64},
            "resources": {"batch_size": B},
        }
    )


def test_mixed_rows_equal_runs_with_one_setting_each(model: dict[str, Any], tmp_path: Path) -> None:
    given = rows()
    mixed = digests_of(run(model, given, tmp_path / "mixed", by_row=True))
    assert len(mixed) == len(given)
    ways = {tuple(row[name] for name in SETTINGS) for row in given}
    assert len(ways) == 1 + len(SETTINGS)
    alone: dict[str, str] = {}
    for number, way in enumerate(sorted(ways, key=str)):
        same = [row for row in given if tuple(row[name] for name in SETTINGS) == way]
        alone |= digests_of(run(model, same, tmp_path / f"alone{number}", by_row=False))
    assert alone == mixed
    assert len(set(mixed.values())) == len(mixed)  # so every setting mattered


def test_batches_stay_full(model: dict[str, Any], tmp_path: Path) -> None:
    given = rows()
    folder = tmp_path / "mixed"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(given), folder / "rows.parquet")
    columns = {"prompt": "prompt", "image": "image", "key": "id", "seed": "seed"}
    columns |= {name: name for name in SETTINGS}
    (marker,) = stream(spec_of(model, columns, {}, folder))
    assert isinstance(marker, Marker)
    sizes = Counter(tuple(row[name] for name in SETTINGS) for row in given).values()
    assert marker.micro_batches == sum(-(-size // B) for size in sizes)


def test_what_each_row_was_made_with_is_written(model: dict[str, Any], tmp_path: Path) -> None:
    given = rows()
    table = table_of(run(model, given, tmp_path / "mixed", by_row=True))
    made = {row["key"]: row for row in table.drop_columns(["image"]).to_pylist()}
    for row in given:
        facts = made[f"{row['id']}-v0"]
        for name in SETTINGS:
            expected = {"ink:0.5,chalk:-1": "chalk:-1,ink:0.5"}.get(row[name], row[name])
            assert facts[name] == expected
