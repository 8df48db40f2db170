"""Records with random changes: every reader of them works or raises one of batchgen's errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from batchgen.cli import main
from batchgen.errors import BatchgenError
from batchgen.output.claim import plan_to_keep
from batchgen.output.holdings import refuse_unless_free
from batchgen.output.lease import holders_of
from batchgen.output.ledger import Ledger
from batchgen.output.marker import FailedMarker
from batchgen.output.outcome import take_stock
from batchgen.output.verify import verify
from batchgen.storage import open_store
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, write_prompts
from tests.fuzzing import fuzz

NAMES = [
    "plan.json",
    "shards/00001.json",
    "shards/1.json",
    "failed/00002.json",
    "lease/00001.json",
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], {"a": 1}, [0], "/dev/zero", "../x", 2**53, -1, 10**400]),
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, of which one failed."""
    folder = tmp_path_factory.mktemp("records")
    path = write_prompts(folder / "in" / "a.parquet", 6)
    plan = plan_for(path, folder / "out", output__samples_per_shard=2)
    ledger = Ledger(open_store(str(folder / "out")))
    make_output(plan, ledger)
    ledger.store.delete("_batchgen/shards/00002.json")
    ledger.fail(FailedMarker(2, 2, "ValueError", "it broke"))
    lease = {"owner": "elsewhere 1 x", "renewed_at": 1.0, "released": True, "shards": [0, 2]}
    ledger.store.put("_batchgen/lease/00001.json", json.dumps(lease).encode())
    (folder / "out/_batchgen/shards/1.json").write_bytes(
        (folder / "out/_batchgen/shards/00001.json").read_bytes()
    )
    return folder / "out"


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree if isinstance(tree, list) else ())
    )
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def changed(tree: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None], odd: Any) -> Any:
    tree = copy.deepcopy(tree)
    if not path:
        return odd
    place = tree
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return tree


def read_all(out: Path) -> None:
    """Everything that `status`, `verify`, `clean` and the start of a resume read."""
    ledger = Ledger(open_store(str(out)))
    with suppress(BatchgenError):
        holders_of(ledger.store)
    for read in (refuse_unless_free, plan_to_keep, verify):
        with suppress(BatchgenError):
            read(ledger)  # type: ignore[operator]
    with suppress(BatchgenError):
        plan = ledger.require_plan()
        take_stock(plan, ledger, ledger.states(plan))
    for command in ("status", "clean"):
        ended = CliRunner().invoke(
            main, [command, str(out), *(["--dry-run"] * (command == "clean"))]
        )
        assert isinstance(ended.exception, SystemExit | None), repr(ended.exception)


@fuzz(quick=60, slow=2000)
@given(data=st.data())
def test_a_record_that_was_changed(out: Path, data: st.DataObject) -> None:
    file = out / "_batchgen" / data.draw(st.sampled_from(NAMES))
    whole = file.read_bytes()
    tree = json.loads(whole)
    kind = data.draw(st.sampled_from(["value", "value", "removed", "cut", "nested"]))
    odd = data.draw(ODD)
    path = data.draw(st.sampled_from(places(tree)))
    if kind == "value":
        text = json.dumps(changed(tree, path, lambda at, key: at.__setitem__(key, odd), odd))
    elif kind == "removed":
        text = json.dumps(changed(tree, path, lambda at, key: at.__delitem__(key), {}))
    elif kind == "cut":
        text = whole.decode()[: data.draw(st.integers(0, len(whole)))]
    else:
        text = "[" * 100_000
    try:
        file.write_text(text, errors="replace")
        read_all(out)
    finally:
        file.write_bytes(whole)
