"""What `push` decides without a hub; `tests/ray/test_push.py` runs it against a stand-in."""

from __future__ import annotations

import hashlib
import uuid
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError, SpecError, VerifyFailed
from batchgen.output.ledger import Ledger
from batchgen.output.push import File, _batches, _blob, _operation, push
from batchgen.storage import open_store


@given(
    st.lists(st.integers(0, 50), max_size=30),
    st.integers(1, 6),
    st.integers(1, 100),
)
def test_batches_hold_all_files_within_limits(sizes: list[int], most: int, most_bytes: int) -> None:
    files = [File(f"data/{n}", f"data/{n}", size, "") for n, size in enumerate(sizes)]
    batches = list(_batches(files, most, most_bytes))
    assert [one for batch in batches for one in batch] == files
    for batch in batches:
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or sum(one.bytes for one in batch) <= most_bytes
    for one, two in pairwise(batches):  # none is smaller than it could be
        more = sum(each.bytes for each in one) + two[0].bytes
        assert len(one) == most or more > most_bytes


@pytest.mark.parametrize(
    "place",
    [
        *("team/images", "hf://team/images", "hf://datasets/images", "hf://models/team/images"),
        *("hf://datasets/team/images/data", "hf://datasets/../images", "hf://datasets/a/b c", ""),
    ],
)
def test_other_places_are_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--to: got .*; allowed: hf://datasets/USER/NAME"):
        push(Ledger(open_store(str(tmp_path))), place)


def test_a_place_without_an_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run has started there"):
        push(Ledger(open_store(str(tmp_path))), "hf://datasets/team/images")


def test_files_of_any_store_are_those_of_their_markers(tmp_path: Path) -> None:
    data = b"data of a file"
    digest = hashlib.sha256(data).hexdigest()
    for store in (open_store(str(tmp_path)), open_store(f"memory://push-{uuid.uuid4().hex}")):
        store.put("data/x.parquet", data)
        operation = _operation(store, File("data/x.parquet", "data/y.parquet", len(data), digest))
        assert operation.path_in_repo == "data/y.parquet"
        with operation.as_file() as file:
            assert file.read() == data
        with pytest.raises(VerifyFailed, match="is missing or damaged"):
            _operation(store, File("data/x.parquet", "data/x.parquet", len(data), "0" * 64))
        with pytest.raises(VerifyFailed, match="is missing or damaged"):
            _operation(store, File("data/none", "data/none", len(data), digest))


def test_blob_ids_are_those_of_git() -> None:
    assert _blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
