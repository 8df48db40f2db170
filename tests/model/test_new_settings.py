"""Two new settings of the prompt, added in four files of the package: a job from rows to proof."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.edited_package import edited_package, run_edited
from tests.outputs import table_of
from tests.tiny_models import build_model

# Style and repeats of each row; None: those of the spec, in oil and 1.
WAYS = [("in oil", 1), ("in ink", None), ("in ink", 2), ("", 2), (None, 2), (None, None)]
JOB = """
import sys

from batchgen.output.ledger import Ledger
from batchgen.output.verify import verify
from batchgen.spec.build import build
from batchgen.storage import open_store
from tests.in_process import stream

model, folder = sys.argv[1:]
columns = {name: name for name in ("prompt", "seed", "style", "repeats")}
stream(
    build(
        {
            "input": {"path": f"{folder}/rows.parquet", "columns": columns},
            "model": {"path": model},
            "sampling": {"style": "in oil", "num_inference_steps": 2},
            "output": {"url": f"{folder}/out"},
        }
    )
)
found = verify(Ledger(open_store(f"{folder}/out")))
assert found.ok, found.problems
"""


def test_rows_with_one_prompt_and_other_settings_of_it_are_other_images(tmp_path: Path) -> None:
    styles, repeats = zip(*WAYS, strict=True)
    same = {"prompt": ["a star"] * len(WAYS), "seed": [1] * len(WAYS)}
    given = {**same, "style": styles, "repeats": pa.array(repeats, pa.int32())}
    pq.write_table(pa.table(given), tmp_path / "rows.parquet")
    model, package = build_model(tmp_path / "model"), edited_package(tmp_path / "edited")
    run = run_edited(package, JOB, str(model), str(tmp_path))
    assert run.returncode == 0, run.stderr
    table = table_of(tmp_path / "out")
    assert table.schema.field("style").type == pa.string()
    assert table.schema.field("repeats").type == pa.int32()
    made = zip(table["style"].to_pylist(), table["repeats"].to_pylist(), strict=True)
    assert list(made) == [("in oil" if style is None else style, many or 1) for style, many in WAYS]
    digests = table["sha256"].to_pylist()
    assert digests[0] == digests[5]  # the same style, as often
    assert len(set(digests)) == len(WAYS) - 1
