"""Planning reads footers, finds the files, and says what is wrong with a dataset."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import DamagedRecord, InputError
from batchgen.plan.plan import make_plan
from batchgen.plan.saved import read_plan
from tests.datasets_on_disk import (
    MODEL,
    plan_for,
    png,
    prompts,
    spec_for,
    text_column,
    write_columns,
    write_prompts,
    write_table,
)


def footer_start(path: Path) -> int:
    data = path.read_bytes()
    return len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]


def ruin_data(path: Path) -> None:
    """Overwrite everything between the magic number and the footer."""
    data = bytearray(path.read_bytes())
    stop = footer_start(path)
    data[4:stop] = b"\xff" * (stop - 4)
    path.write_bytes(bytes(data))


def fails(path: Path | str, **dotted: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan_for(path, **dotted)
    return str(caught.value)


def test_planning_reads_no_data_pages(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 500, groups=[200, 200, 100])
    before = plan_for(path)
    ruin_data(path)
    with pytest.raises(OSError):
        pq.read_table(path)
    after = plan_for(path)
    assert [file.row_groups for file in after.files] == [(200, 200, 100)]
    assert (after.rows, after.columns) == (before.rows, before.columns)


def test_only_the_key_column_is_read_as_data(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"id": range(100), "prompt": prompts(100)})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    chunk = pq.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(data))
    assert plan_for(path, input__columns__key="id").rows == 100


def test_a_folder_is_searched_deeply_in_order_of_path(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a.parquet", "b/1.parquet", "_old/3.parquet", "b/.4.parquet"):
        write_prompts(tmp_path / name, 2)
    write_prompts(tmp_path / "b/_5.parquet", 2)
    (tmp_path / "notes.txt").write_text("not data")
    plan = plan_for(tmp_path)
    assert [file.name for file in plan.files] == ["a.parquet", "b/1.parquet", "b/2.parquet"]
    assert plan.rows == 6


def test_a_hidden_folder_may_itself_be_the_input(tmp_path: Path) -> None:
    write_prompts(tmp_path / "_hidden/.deeper/a.parquet", 2)
    assert plan_for(tmp_path / "_hidden/.deeper").rows == 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("[b-z].parquet", ["b.parquet"]),
        ("sub/?.parquet", ["c.parquet"]),
        ("**/*.parquet", ["a.parquet", "b.parquet", "sub/c.parquet"]),
    ],
)
def test_a_glob_names_files_from_its_fixed_part(
    pattern: str, names: list[str], tmp_path: Path
) -> None:
    for name in ("a.parquet", "b.parquet", "sub/c.parquet"):
        write_prompts(tmp_path / name, 1)
    assert [file.name for file in plan_for(f"{tmp_path}/{pattern}").files] == names


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "data.pq", 3)
    assert [file.name for file in plan_for(path).files] == ["data.pq"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts [final].parquet", 3)
    assert [file.name for file in plan_for(path).files] == ["prompts [final].parquet"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "no such file or folder"),
        ("empty", "it has no .parquet file"),
        ("*.arrow", "it has no .parquet file"),
    ],
)
def test_nothing_to_read_is_named(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fails(tmp_path / path) == f"input {tmp_path / path}: {message}"


def test_an_unknown_protocol_is_an_input_error() -> None:
    assert "teleport" in fails("teleport://bucket/in")


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    write_prompts(tmp_path / "b.parquet", 5)
    assert plan_for(tmp_path, input__limit=7).rows == 7
    assert plan_for(tmp_path, input__limit=70).rows == 10


def test_row_keys_do_not_depend_on_what_else_is_there(tmp_path: Path) -> None:
    write_prompts(tmp_path / "b.parquet", 5)
    file, row = plan_for(tmp_path).locate(4)
    write_prompts(tmp_path / "a.parquet", 1000)
    write_prompts(tmp_path / "c.parquet", 1000)
    assert (file.name, row) == ("b.parquet", 4)
    later, later_row = plan_for(tmp_path).locate(1004)
    assert (later.name, later_row) == (file.name, row)


def test_an_empty_dataset(tmp_path: Path) -> None:
    write_columns(tmp_path / "a.parquet", {"prompt": pa.array([], pa.string())})
    assert fails(tmp_path) == f"input {tmp_path}: the dataset has no rows"


def test_an_empty_file_among_others_is_no_fault(tmp_path: Path) -> None:
    for name, count in (("a", 0), ("b", 3), ("c", 0)):
        values = pa.array(prompts(count), pa.string())
        write_columns(tmp_path / f"{name}.parquet", {"prompt": values})
    plan = plan_for(tmp_path)
    assert [plan.locate(row)[0].name for row in range(3)] == ["b.parquet"] * 3


@pytest.mark.parametrize("kept_bytes", [0, 3, 100, -1])
def test_a_truncated_file_is_named_with_its_size(kept_bytes: int, tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 3)
    path = write_prompts(tmp_path / "b.parquet", 300)
    data = path.read_bytes()[:kept_bytes]
    path.write_bytes(data)
    message = fails(tmp_path)
    assert message.startswith(
        f"input file {path} is not a complete Parquet file ({len(data)} bytes)"
    )


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\na cat\n")
    assert fails(path).startswith(f"input file {path} is not a complete Parquet file")


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"promt": ["a"], "other": [1]})
    assert fails(path) == (
        f"input.columns.prompt: no column 'prompt' in {path}; it has promt, other; "
        "did you mean 'promt'?"
    )


def test_a_missing_kept_column(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 1)
    message = fails(path, input__keep_columns=["numbers"])
    assert message.startswith(f"input.keep_columns numbers: no column 'numbers' in {path}")
    assert message.endswith("did you mean 'number'?")


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array([1]), pa.array([2])]
    table = pa.Table.from_arrays(columns, ["prompt", "n", "n"])
    path = write_table(tmp_path / "a.parquet", table)
    assert "has two columns named 'n'" in fails(path)


@pytest.mark.parametrize(
    ("part", "values", "needed"),
    [
        ("prompt", [1], "text"),
        ("negative_prompt", [1.5], "text"),
        ("key", [1.5], "text or integers"),
        ("seed", [1.5], "integers"),
        ("num_inference_steps", ["20"], "integers"),
        ("width", [True], "integers"),
        ("guidance_scale", ["7"], "numbers"),
    ],
)
def test_a_column_of_the_wrong_type(
    part: str, values: list[Any], needed: str, tmp_path: Path
) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["a"], "bad": values})
    kind = pa.array(values).type
    assert fails(path, **{f"input__columns__{part}": "bad"}) == (
        f"input.columns.{part}: column 'bad' in {path} has type {kind}; needed: {needed}"
    )


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        (pa.array([png()]), True),
        (pa.array([png()], pa.large_binary()), True),
        (pa.array([{"bytes": png(), "path": None}]), True),
        (pa.array(["a.png"]), True),
        (pa.array([{"path": "a.png"}]), True),
        (pa.array([1.5]), False),
        (pa.array([{"other": "a.png"}]), False),
        (pa.array([{"bytes": "text"}]), False),
    ],
)
def test_what_can_be_an_image_column(values: pa.Array, fits: bool, tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"prompt": ["a"], "image": values})
    task = {"task": "image-to-image", "input__columns__image": "image"}
    if fits:
        assert plan_for(path, **task).rows == 1
    else:
        needed = "needed: image bytes, URIs, or an image struct with bytes or path"
        assert needed in fails(path, **task)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.null()])
def test_other_text_types_are_fine(kind: pa.DataType, tmp_path: Path) -> None:
    values = pa.nulls(1, kind) if kind == pa.null() else pa.array(["a"], kind)
    assert plan_for(write_columns(tmp_path / "a.parquet", {"prompt": values})).rows == 1


def test_a_dictionary_coded_prompt_is_fine(tmp_path: Path) -> None:
    values = pa.array(["a", "b", "a"]).dictionary_encode()
    assert plan_for(write_columns(tmp_path / "a.parquet", {"prompt": values})).rows == 3


@pytest.mark.parametrize(
    ("other", "was", "now"),
    [
        ({"prompt": ["x"]}, "int64", "missing"),
        ({"prompt": ["x"], "number": ["1"]}, "int64", "string"),
    ],
)
def test_files_of_different_columns(
    other: dict[str, Any], was: str, now: str, tmp_path: Path
) -> None:
    first = write_prompts(tmp_path / "a.parquet", 2)
    second = write_columns(tmp_path / "b.parquet", other)
    assert f"column 'number': {was} in {first}, {now} in {second}" in fails(tmp_path)


def keyed(path: Path, keys: Any) -> Path:
    return write_columns(path, {"prompt": ["p"] * len(keys), "id": keys})


@pytest.mark.parametrize("twice", ["k3", 3])
def test_a_key_that_stands_twice_names_both_places(twice: Any, tmp_path: Path) -> None:
    kind = type(twice)
    first = keyed(tmp_path / "a.parquet", [kind(f"{k}"[-1:]) for k in range(3)] + [twice])
    second = keyed(tmp_path / "b.parquet", [kind("7"), twice, kind("8")])
    assert fails(tmp_path, input__columns__key="id") == (
        f"input.columns.key: column 'id' has the same key in {first} row 3 and {second} row 1; "
        "keys must be unique"
    )


def test_a_duplicate_key_in_one_file(tmp_path: Path) -> None:
    path = keyed(tmp_path / "a.parquet", ["x", "y", "x"])
    assert f"{path} row 0 and {path} row 2" in fails(path, input__columns__key="id")


def test_null_keys_are_no_duplicates(tmp_path: Path) -> None:
    path = keyed(tmp_path / "a.parquet", pa.array([None, "a", None, None]))
    assert plan_for(path, input__columns__key="id").rows == 4


def test_keys_beyond_the_limit_do_not_count(tmp_path: Path) -> None:
    path = keyed(tmp_path / "a.parquet", ["x", "y", "x"])
    assert plan_for(path, input__columns__key="id", input__limit=2).rows == 2
    assert "has the same key in" in fails(path, input__columns__key="id", input__limit=3)


def test_the_key_check_can_be_left_out(tmp_path: Path) -> None:
    path = keyed(tmp_path / "a.parquet", ["x", "x"])
    spec = spec_for(path, input__columns__key="id", input__check_keys=False)
    assert make_plan(spec, MODEL).rows == 2
    with_check = spec_for(path, input__columns__key="id")
    assert make_plan(with_check, MODEL, check_keys=False).rows == 2


def test_keys_that_are_not_utf8_are_compared_by_their_bytes(tmp_path: Path) -> None:
    path = keyed(tmp_path / "a.parquet", text_column([b"\xff", b"\xfe", b"ok"]))
    assert plan_for(path, input__columns__key="id").rows == 3
    path = keyed(tmp_path / "b.parquet", text_column([b"\xff", b"ok", b"\xff"]))
    assert f"{path} row 0 and {path} row 2" in fails(path, input__columns__key="id")


def test_files_that_would_share_keys_are_refused(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"]})
    for name in ("a", "a.parquet"):
        pq.write_table(table, tmp_path / name)
    with pytest.raises(InputError, match="same keys"):
        plan_for(f"{tmp_path}/a*")


def test_a_damaged_plan_is_said_to_be_damaged() -> None:
    for text in ("", "{", "{}", "null", "[" * 100_000, '{"version": 2}'):
        with pytest.raises(DamagedRecord, match="the plan is damaged"):
            read_plan(text)


def test_an_output_inside_its_input_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(InputError, match="is inside the input"):
        plan_for(tmp_path, tmp_path / "out")
    assert plan_for(tmp_path / "in.parquet", tmp_path / "out").rows == 1
