"""The files of an input: links, unusual names, special files, and changes after planning."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from batchgen.errors import InputError, SpecError
from batchgen.input.reader import make_spans, read_columns, read_span
from batchgen.spec.build import build
from batchgen.spec.tree import merge
from batchgen.storage import find_files, open_input
from tests.datasets_on_disk import plan_for, write_prompts


def names_of(path: str | Path) -> list[str]:
    base, files = find_files(str(path))
    return [os.path.relpath(file.path, base) for file in files]


def test_linked_files_and_folders_are_searched_as_those_of_a_hugging_face_cache(
    tmp_path: Path,
) -> None:
    blobs = tmp_path / "blobs"
    write_prompts(blobs / "b", 3)
    write_prompts(tmp_path / "elsewhere" / "c.parquet", 2)
    folder = tmp_path / "snapshots" / "abc"
    write_prompts(folder / "a.parquet", 4)
    (folder / "b.parquet").symlink_to("../../blobs/b")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    plan = plan_for(folder)
    assert [file.name for file in plan.files] == ["a.parquet", "b.parquet", "more/c.parquet"]
    assert plan.rows == 9
    link = folder / "b.parquet"
    assert plan.files[1].path == str(link) and plan.files[1].size == (blobs / "b").stat().st_size
    assert plan.files[1].etag == str((blobs / "b").stat().st_mtime)
    assert names_of(f"{folder}/*.parquet") == ["a.parquet", "b.parquet"]
    assert names_of(f"{folder}/*/*.parquet") == ["more/c.parquet"]
    assert names_of(f"{folder}/**/*.parquet") == ["a.parquet", "b.parquet", "more/c.parquet"]


def test_the_rows_of_a_link_are_read(tmp_path: Path) -> None:
    write_prompts(tmp_path / "blob", 3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").symlink_to(tmp_path / "blob")
    plan = plan_for(tmp_path / "in")
    columns = read_columns(plan.spec, ["prompt", "number"])
    (span,) = make_spans(plan, [0])
    (rows,) = read_span(span, plan.spec, columns)
    assert rows.source_ids == ("a.parquet#0", "a.parquet#1", "a.parquet#2")


def test_circles_of_links_end_and_every_folder_is_searched_once(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in" / "deep" / "a.parquet", 1)
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / "again").symlink_to("deep")
    (tmp_path / "in" / "twice").symlink_to("again")
    assert names_of(tmp_path / "in") == ["deep/a.parquet"]
    assert names_of(f"{tmp_path}/in/**/*.parquet") == ["deep/a.parquet"]
    assert names_of(tmp_path / "in" / "twice") == ["a.parquet"]


def test_a_link_that_leads_nowhere_is_named_not_left_out(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in" / "a.parquet", 1)
    link = tmp_path / "in" / "b.parquet"
    for target in ("gone.parquet", "b.parquet"):
        link.symlink_to(target)
        for path in (link.parent, f"{link.parent}/*.parquet", link):
            with pytest.raises(
                InputError, match=rf"b\.parquet is a link to {target}, which does not"
            ):
                find_files(str(path))
        link.unlink()
    (tmp_path / "in" / "lost-folder").symlink_to("/nowhere/at/all")
    with pytest.raises(InputError, match="lost-folder is a link to /nowhere/at/all"):
        find_files(str(tmp_path / "in"))


def test_hidden_names_are_left_out_even_where_they_are_broken(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in" / "a.parquet", 1)
    write_prompts(tmp_path / "in" / "_old" / "b.parquet", 1)
    (tmp_path / "in" / ".#lock").symlink_to("user@host")
    assert names_of(tmp_path / "in") == ["a.parquet"]


def test_capital_letters_and_folders_named_like_files(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in" / "A.PARQUET", 1)
    write_prompts(tmp_path / "in" / "spark.parquet" / "part-0.parquet", 1)
    assert names_of(tmp_path / "in") == ["A.PARQUET", "spark.parquet/part-0.parquet"]
    assert names_of(f"{tmp_path}/in/*.parquet") == ["spark.parquet/part-0.parquet"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    for path in (tmp_path, tmp_path / "a.parquet", f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"a\.parquet is not a regular file"):
            find_files(str(path))
    with pytest.raises(InputError, match="not a regular file"):
        open_input(str(tmp_path / "a.parquet"), str(tmp_path))
    with pytest.raises(InputError, match="not a regular file"):
        find_files("/dev/zero")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.parquet")).write_bytes(b"")
    with pytest.raises(InputError, match=r"\\udcff\.parquet' is not UTF-8"):
        find_files(str(tmp_path))


def test_a_file_of_equal_size_in_the_place_of_a_planned_one_is_refused(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 4)
    plan = plan_for(path)
    (span,) = make_spans(plan, [0])
    kept, written_at = path.read_bytes(), path.stat().st_mtime_ns
    path.unlink()
    path.write_bytes(kept)
    os.utime(path, ns=(1, written_at + 2_000_000_000))
    with pytest.raises(InputError, match=r"a\.parquet has changed: it was written at 20"):
        list(read_span(span, plan.spec, ["prompt"]))
    os.utime(path, ns=(1, written_at))  # a copy with the same time is the same file
    (rows,) = read_span(span, plan.spec, ["prompt"])
    assert rows.table.num_rows == 4


def test_a_file_that_is_written_to_between_two_reads_is_refused(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.parquet", 4, [2, 2])
    plan = plan_for(path, output__samples_per_shard=2)
    (span,) = make_spans(plan, [0, 1], max_spans=1)
    shards = read_span(span, plan.spec, ["prompt"])
    next(shards)
    os.utime(path, (1, path.stat().st_mtime + 2))
    with pytest.raises(InputError, match="has changed"):
        next(shards)


@pytest.mark.parametrize(
    ("planned", "now", "same"),
    [
        ("1700000000.25", 1700000000.25, True),
        ("1700000000.25", 1700000000.75, False),
        ("1700000000.25", 1700000000.0, True),  # a disk that keeps whole seconds
        ("1700000000.25", 1700000001.0, False),
    ],
)
def test_times_are_equal_to_the_second_where_a_disk_keeps_no_more(
    planned: str, now: float, same: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"x")
    os.utime(path, (now, now))
    if same:
        open_input(str(path), str(path), planned).close()
    else:
        with pytest.raises(InputError, match="has changed"):
            open_input(str(path), str(path), planned)


@pytest.mark.parametrize("count", [10**10 + 1, 10**13, 10**15, 10**30])
def test_a_count_that_no_plan_could_hold_is_refused_by_name(count: int) -> None:
    with pytest.raises(SpecError) as caught:
        build(merge({}, {"input.count": count, "output.url": "out"}))
    allowed = "a whole number from 1 to 10,000,000,000"
    assert str(caught.value) == f"input.count: got {count}; allowed: {allowed}"


@pytest.mark.parametrize("path", ["http://[", "hf://x", "*" * 60])
def test_an_address_that_cannot_be_read_is_an_input_error(path: str) -> None:
    with pytest.raises(InputError, match=re.escape(path[:5])):
        find_files(path)
