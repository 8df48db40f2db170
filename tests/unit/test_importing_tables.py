"""CSV, JSON Lines and text: types, keys, classes, settings and images by name, row by row."""

from __future__ import annotations

import csv
import io
import json
import math
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.importing.summary import Summary
from batchgen.importing.target import target_at
from batchgen.importing.work import import_source, source_at
from tests.datasets_on_disk import png
from tests.fuzzing import fuzz

Tree = dict[str, Any]


def imported(source: Path, **how: Any) -> tuple[Summary, list[Tree]]:
    out = source.parent / "imported.parquet"
    summary = import_source(source_at(str(source), **how), target_at(str(out)))
    return summary, pq.read_table(out).to_pylist()


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def parts(source: Path) -> Tree:
    told = pq.read_schema(source.parent / "imported.parquet").metadata[b"batchgen"]
    columns: Tree = json.loads(told)["columns"]
    return columns


def test_csv_columns_have_types_and_parts(tmp_path: Path) -> None:
    text = "prompt,seed,guidance_scale,width,zip,label\na,1,2,512,00501,cat\nb,,3.5,,99,dog\n"
    path = written(tmp_path, "p.csv", text)
    summary, rows = imported(path)
    assert rows == [
        {
            "key": "p-00000000",
            "prompt": "a",
            "seed": 1,
            "guidance_scale": 2.0,
            "width": 512,
            "zip": "00501",
            "label": 0,
        },
        {
            "key": "p-00000001",
            "prompt": "b",
            "seed": None,
            "guidance_scale": 3.5,
            "width": None,
            "zip": "99",
            "label": 1,
        },
    ]
    assert summary.classes == {"cat": 1, "dog": 1}
    mapped = ("key", "prompt", "seed", "guidance_scale", "label")
    assert parts(path) == {name: name for name in mapped}  # a width may be that of an image


BAD_LINES = [
    (b"a,1,extra", "bad-fields", "line 3: got 3 fields; allowed: 2"),
    (b"a", "bad-fields", "line 3: got 1 fields; allowed: 2"),
    (b'"a"b,1', "bad-fields", "line 3"),
    (b"\xff\xfe,1", "not-utf8", "field 'prompt'"),
    (b"a,many", "bad-value", "field 'seed': got 'many'"),
    (b"a,1.5", "bad-value", "field 'seed': got '1.5'"),
    (b"a,99999999999999999999", "bad-value", "field 'seed'"),
]


@pytest.mark.parametrize(("line", "reason", "said"), BAD_LINES)
def test_a_bad_line_of_csv_costs_itself(
    line: bytes, reason: str, said: str, tmp_path: Path
) -> None:
    path = written(tmp_path, "p.csv", b"prompt,seed\nfirst,1\n" + line + b"\nlast,3\n")
    summary, rows = imported(path)
    assert [row["prompt"] for row in rows] == ["first", "last"]
    assert [row["key"] for row in rows] == ["p-00000000", "p-00000002"]
    assert summary.reasons == {reason: 1} and said in summary.examples[reason]
    (reject,) = pq.read_table(tmp_path / "imported-rejects.parquet").to_pylist()
    assert reject["source_file"] == "p.csv" and reject["place"] == "line 3"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no header"),
        (b"\n", "no header"),
        (b"a,,b\n1,2,3\n", "column 2 has no name"),
        (b"a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ("prompt\nx\n".encode("utf-16"), "UTF-16"),
        (b"\xff\n1\n", "not UTF-8"),
        (b"\r\x00", "cannot be read"),
        (b"prompt\rx\ry", "cannot be read"),  # lines of an old Mac
        (b'"a"b,c\n1,2\n', "cannot be read"),
        (b'"a\nb",c\n1,2\n', "cannot be read"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as error:
        imported(written(tmp_path, "p.csv", data))
    assert "p.csv" in str(error.value)


QUOTES = [
    ('prompt\nfirst\n"never closed\nlast\n', ["first", "last"], 3),
    ('prompt\nfirst\n"a" b\nlast\n', ["first", "last"], 3),
    ('prompt,seed\na,1\n"b,2\nc,3\n"d,4\ne,5\n', ["a", "c", "e"], 3),
    ('prompt\n"two\nlines"\nlast\n', ["two\nlines", "last"], 0),
]


@pytest.mark.parametrize(("text", "prompts", "line"), QUOTES)
def test_a_stray_quote_costs_its_own_rows_and_every_row_is_counted(
    text: str, prompts: list[str], line: int, tmp_path: Path
) -> None:
    summary, rows = imported(written(tmp_path, "p.csv", text))
    assert [row["prompt"] for row in rows] == prompts
    if line:
        assert summary.reasons.keys() == {"bad-fields"} and f"line {line}" in str(summary.examples)


def test_a_stray_quote_in_the_middle_costs_one_row_of_a_thousand(tmp_path: Path) -> None:
    lines = [f"prompt {number},{number}" for number in range(1000)]
    lines[500] = '"' + lines[500]
    summary, rows = imported(written(tmp_path, "p.csv", "prompt,seed\n" + "\n".join(lines) + "\n"))
    assert len(rows) == 999 and summary.reasons == {"bad-fields": 1}
    assert rows[-1]["prompt"] == "prompt 999"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_that_of_the_header(delimiter: str, tmp_path: Path) -> None:
    text = f"\ufeffprompt{delimiter}seed\r\na{delimiter}1\r\n"
    _, rows = imported(written(tmp_path, "p.csv", text))
    assert rows == [{"key": "p-00000000", "prompt": "a", "seed": 1}]


def test_several_csv_files_need_the_same_header(tmp_path: Path) -> None:
    written(tmp_path, "in/a.csv", "prompt\nx\n")
    written(tmp_path, "in/b.csv", "prompt\ny\n")
    summary, rows = imported(tmp_path / "in")
    assert [row["key"] for row in rows] == ["a-00000000", "b-00000000"] and summary.rows == 2
    written(tmp_path, "in/b.csv", "text\ny\n")
    with pytest.raises(InputError, match=r"b\.csv has the columns text; a\.csv has prompt"):
        imported(tmp_path / "in")


def test_a_glob_of_files(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.txt"):
        written(tmp_path, f"in/{name}", "prompt\nx\n")
    out = target_at(str(tmp_path / "out.parquet"))
    assert import_source(source_at(f"{tmp_path}/in/*.csv"), out).rows == 2


def test_keys_of_the_source_are_kept_and_unique(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "key,prompt\na,1\nb c,2\na,3\n,4\n")
    summary, rows = imported(path)
    assert rows[0]["key"] == "a" and rows[1]["key"].startswith("b-c-x")
    assert summary.reasons == {"duplicate-key": 1, "bad-value": 1}
    assert "p.csv line 4" in summary.examples["duplicate-key"]


def test_images_by_name_come_from_the_folder_of_the_file(tmp_path: Path) -> None:
    written(tmp_path, "in/photos/1.png", png())
    written(tmp_path, "secret.png", png())
    text = (
        "image,prompt\nphotos/1.png,a\nphotos/2.png,b\n../secret.png,c\n,d\nhttps://x.org/3.png,e\n"
    )
    path = written(tmp_path, "in/p.csv", text)
    summary, rows = imported(path)
    assert [row["prompt"] for row in rows] == ["a", "d", "e"]
    assert rows[0]["image"] == {"bytes": png(), "path": "photos/1.png"}
    assert rows[1]["image"] is None
    assert rows[2]["image"] == {"bytes": None, "path": "https://x.org/3.png"}
    assert summary.reasons == {"missing-image": 1, "forbidden-image": 1}
    assert parts(path)["image"] == "image"
    assert any("1 images are only named by their URL" in note for note in summary.notes)


def test_a_column_file_name_is_the_image(tmp_path: Path) -> None:
    written(tmp_path, "in/1.png", png())
    path = written(tmp_path, "in/p.jsonl", '{"file_name": "1.png", "text": "a"}\n')
    _, rows = imported(path)
    assert rows[0]["image"]["bytes"] == png() and rows[0]["file_name"] == "1.png"
    assert parts(path) == {"key": "key", "image": "image", "prompt": "text"}


JSON_LINES = [
    (b"{", "bad-json", "line 2"),
    (b"[1]", "bad-json", "got a list"),
    (b'{"prompt": NaN}', "bad-json", "NaN"),
    (b'{"prompt": "a", "prompt": "b"}', "bad-json", "'prompt' occurs twice"),
    (b'{"prompt": "\xff"}', "not-utf8", "line 2"),
    (b'{"prompt": "\\ud800"}', "bad-json", "surrogate"),
    (b'{"prompt": 5}', "bad-value", "field 'prompt': got a whole number; allowed: text"),
    (b'{"n": 1e400}', "bad-value", "field 'n'"),
    (b'{"n": 100000000000000000000}', "bad-value", "field 'n'"),
    (b'{"x": ' + b"[" * 40 + b"]" * 40 + b"}", "bad-json", "32 levels"),
    (b"[" * 100_000, "bad-json", "line 2"),
    (b'{"objects": {"bbox": [[1, 2, 3, 4]], "category": []}}', "bad-objects", "equal lengths"),
]


@pytest.mark.parametrize(("line", "reason", "said"), JSON_LINES)
def test_a_bad_line_of_json_costs_itself(
    line: bytes, reason: str, said: str, tmp_path: Path
) -> None:
    first = b'{"prompt": "a", "n": 1, "objects": {"bbox": [[1, 2, 3, 4]], "category": ["c"]}}\n'
    path = written(tmp_path, "p.jsonl", first + line + b'\n{"prompt": "b"}\n')
    summary, rows = imported(path)
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert summary.reasons == {reason: 1}
    assert said in summary.examples[reason], summary.examples


def test_nested_json_keeps_its_shape(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "x": {"y": [1, 2.5], "z": {}}, "t": True},
        {"prompt": "b", "x": {"w": "v"}, "regions": [{"phrase": "p", "box": [0, 0, 1, 1]}]},
    ]
    path = written(tmp_path, "p.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _, rows = imported(path)
    assert rows[0]["x"] == {"y": [1.0, 2.5], "z": None, "w": None}
    assert rows[1]["x"] == {"y": None, "z": None, "w": "v"} and rows[1]["t"] is None
    assert rows[1]["regions"] == [{"phrase": "p", "box": [0, 0, 1, 1]}]
    assert parts(path)["regions"] == "regions"


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", b"\xef\xbb\xbffirst\r\n\n  second \n\xff\nlast")
    summary, rows = imported(path)
    assert rows == [
        {"key": "p-00000000", "prompt": "first"},
        {"key": "p-00000002", "prompt": "second"},
        {"key": "p-00000004", "prompt": "last"},
    ]
    assert summary.reasons == {"not-utf8": 1} and "p.txt line 4" in summary.examples["not-utf8"]


NAMES = st.text(string.ascii_lowercase, min_size=3, max_size=6).filter(
    lambda name: name not in ("key", "label", "image", "mask", "seed", "eta", "lora", "control")
)
CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), max_size=8)


@fuzz(quick=60)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8),
    names=st.lists(NAMES, min_size=2, max_size=2, unique=True),
    delimiter=st.sampled_from(",;\t|"),
)
def test_what_csv_writes_is_what_is_imported(
    rows: list[tuple[str, str]],
    names: list[str],
    delimiter: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Texts, and numbers by their value."""
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([names, *rows])
    path = written(tmp_path_factory.mktemp("csv"), "p.csv", sink.getvalue())
    summary, found = imported(path)
    assert summary.rejected == 0 and len(found) == len(rows)
    for row, given_row in zip(found, rows, strict=True):
        for name, cell in zip(names, given_row, strict=True):
            value = row[name]
            if value is None or isinstance(value, str):
                assert (value or "") == cell
            else:
                assert math.isclose(value, float(cell))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
)


@fuzz(quick=60)
@given(values=st.dictionaries(NAMES, JSON_VALUES, max_size=4))
def test_one_line_of_json_is_imported_as_it_is(
    values: Tree, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """If its lists hold values of one type."""
    try:
        text = json.dumps(values)
        text.encode()
        json.loads(text)
    except UnicodeEncodeError:
        return
    path = written(tmp_path_factory.mktemp("json"), "p.jsonl", text + "\n")
    try:
        _, rows = imported(path)
    except InputError as error:
        assert "bad-value" in str(error) or "bad-json" in str(error)
        return
    for name, value in values.items():
        assert _same(value, rows[0][name]), (value, rows[0][name])


def _same(one: Any, other: Any) -> bool:
    """Equal, with nulls for the fields that a struct does not have."""
    if isinstance(one, dict):
        return isinstance(other, dict) and all(_same(one.get(key), other[key]) for key in other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(-9, 99) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["size", "counts", "bbox", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
OBJECT_FIELDS = st.sampled_from(
    ["bbox", "category", "categories", "category_id", "segmentation", "rle", "keypoints", "id", "x"]
)


@fuzz(quick=150)
@given(objects=st.dictionaries(OBJECT_FIELDS, ANY_JSON, max_size=4), as_lists=st.booleans())
def test_any_objects_are_a_row_or_a_reject(
    objects: Tree, as_lists: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("objects")
    written(folder, "1.png", png(20, 10))
    good = {"bbox": [1, 1, 2, 2], "category": "cat", "rle": None}
    value = {name: [one] for name, one in objects.items()} if as_lists else [objects]
    lines = [{"image": "1.png", "objects": one} for one in ([good], value)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    summary, rows = imported(written(folder, "p.jsonl", text))
    assert rows[0]["objects"]["bbox"] == [[1.0, 1.0, 2.0, 2.0]]
    assert summary.rows + summary.rejected == 2
    assert summary.reasons.keys() <= {"bad-objects", "unknown-category", "bad-value"}


def test_the_schema_of_a_table_has_the_types_of_arrow(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "prompt,n,x\na,1,0.5\n")
    imported(path)
    schema = pq.read_schema(tmp_path / "imported.parquet")
    kinds = {field.name: field.type for field in schema}
    assert kinds["key"] == pa.string()
    assert (kinds["n"], kinds["x"]) == (pa.int64(), pa.float64())
