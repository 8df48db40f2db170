"""The actor that reads: what it cannot open ends the job with the error's own exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from batchgen.engine import stream
from batchgen.engine.read import Read
from batchgen.errors import SpecError, from_facts
from batchgen.input.reader import make_spans
from batchgen.shard.frames import STOPPED, from_block
from tests.datasets_on_disk import plan_for, write_prompts


def test_a_variable_that_a_reader_lacks_stops_the_job_by_name(tmp_path: Path) -> None:
    options = {"memory": {"token": "${NOT_THERE_AT_ALL}"}}
    plan = plan_for(write_prompts(tmp_path / "in.parquet", 3), storage_options=options)
    (span,) = make_spans(plan, [0])
    reader = Read(plan.spec, ["prompt"])
    (block,) = reader(pa.table({"span": [span.to_json()]}))
    frame = from_block(block)
    error = from_facts(json.loads(frame.facts))
    assert frame.state == STOPPED and isinstance(error, SpecError) and error.exit_code == 1
    assert "storage_options.memory.token" in str(error) and "NOT_THERE_AT_ALL" in str(error)


def test_readers_wait_for_the_pool_after_them() -> None:
    """Ray Data reads a variable; under another name, readers would fill the driver's memory.

    What it saves is measured by benchmarks/million.py.
    """
    from ray.data import DataContext
    from ray.data._internal.execution.backpressure_policy import (
        downstream_capacity_backpressure_policy as policy,
    )

    assert stream.generate
    limits = policy.DownstreamCapacityBackpressurePolicy
    assert limits.OBJECT_STORE_BUDGET_UTIL_THRESHOLD == 0
    assert DataContext.get_current().downstream_capacity_backpressure_ratio == 2
