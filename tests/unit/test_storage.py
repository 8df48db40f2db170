"""Storage: complete objects or none, on disks and in memory, and how its errors are mapped."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from batchgen.errors import InputError, RetryShard, StorageFailed
from batchgen.storage import TEMPORARY, Store, find_files, open_input, open_store, storage_errors


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        yield open_store(str(tmp_path / "out"))
        return
    folder = f"memory://{uuid.uuid4().hex}"
    yield open_store(folder)
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(folder, recursive=True)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_put_reads_back_and_replaces(store: Store) -> None:
    store.put("a/b.bin", b"one")
    assert store.read("a/b.bin") == b"one"
    store.put("a/b.bin", b"other")
    assert store.read("a/b.bin") == b"other"
    assert list(store.find("a")) == ["b.bin"]
    with store.open("a/b.bin") as file:
        assert file.read() == b"other"


def test_put_new_takes_a_free_name_alone(store: Store) -> None:
    assert store.put_new("m.json", b"mine")
    assert not store.put_new("m.json", b"theirs")
    assert store.read("m.json") == b"mine"


def test_put_new_of_the_same_content_counts_as_ours(store: Store) -> None:
    assert store.put_new("m.json", b"mine")
    assert store.put_new("m.json", b"mine")


def test_list_names_files_directly_in_a_folder(store: Store) -> None:
    store.put("f/one", b"1")
    store.put("f/two", b"22")
    store.put("f/deeper/three", b"333")
    assert store.list("f") == {"one": 1, "two": 2}
    assert store.list("nowhere") == {}


def test_list_sees_what_came_after_an_earlier_list(store: Store) -> None:
    store.put("f/one", b"1")
    assert store.list("f") == {"one": 1}
    store.put("f/two", b"2")
    assert store.list("f").keys() == {"one", "two"}


def test_delete_is_content_when_there_is_nothing(store: Store) -> None:
    store.put("f/one", b"1")
    store.delete("f/one")
    store.delete("f/one")
    store.delete("never/there")
    assert "one" not in store.find("f")


def test_reading_nothing_is_file_not_found(store: Store) -> None:
    store.put("something", b"1")
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_opening_a_store_creates_nothing(disk: Store, tmp_path: Path) -> None:
    assert disk.local
    assert disk.list("data") == {}
    assert not (tmp_path / "out").exists()


def test_nothing_temporary_is_left(disk: Store) -> None:
    disk.put("data/x", b"1")
    disk.put_new("data/y", b"1")
    disk.put_new("data/y", b"2")
    assert files_below(Path(disk.root)) == {"data/x", "data/y"}


class Crash(BaseException):
    """Stands for a crash of the process: no code catches it."""


@pytest.mark.parametrize("verb", ["put", "put_new"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_crash_before_the_rename_leaves_what_was_there(
    verb: str, old: bytes | None, disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old is not None:
        disk.put("data/x", old)
    with monkeypatch.context() as patch:
        for name in ("replace", "link", "unlink"):
            patch.setattr(os, name, _crash)
        with pytest.raises(Crash):
            getattr(disk, verb)("data/x", b"new and longer")
    assert disk.list("data") == ({} if old is None else {"x": len(old)})
    assert len(disk.list(TEMPORARY)) == 1
    disk.clear_temporary(older_than_s=-1)
    assert disk.list(TEMPORARY) == {}


def _crash(*_: object, **__: object) -> None:
    raise Crash


def test_a_reader_never_sees_a_part(disk: Store) -> None:
    bodies = [bytes([number]) * 300_000 for number in (1, 2)]
    disk.put("x", bodies[0])
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(disk.read("x"))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(30):
        disk.put("x", bodies[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(bodies)


def test_one_of_many_threads_creates_a_name(disk: Store) -> None:
    gate = threading.Barrier(12)
    won: list[int] = []

    def reach(number: int) -> None:
        gate.wait()
        if disk.put_new("prize", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=reach, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert disk.read("prize") == str(won[0]).encode()


def failing(error: OSError) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some space, then run it again"),
        (errno.EDQUOT, "quota exceeded; free some space, then run it again"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "permission denied; check the credentials and rights"),
    ],
)
def test_a_refusing_disk_stops_the_job(
    code: int, words: str, disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(OSError(code, os.strerror(code))))
    with pytest.raises(StorageFailed) as caught:
        disk.put("data/x", b"1")
    assert str(caught.value).startswith(f"cannot write {disk.url}/data/x: ")
    assert words in str(caught.value)
    assert caught.value.exit_code == 3
    assert files_below(Path(disk.root)) == set()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("slow"),
        OSError(errno.EIO, "i/o"),
    ],
)
def test_a_passing_fault_is_tried_again(error: OSError) -> None:
    with pytest.raises(RetryShard) as caught, storage_errors("read s3://b/x"):
        raise error
    assert str(caught.value) == f"cannot read s3://b/x: {type(error).__name__}: {error}"


@pytest.mark.parametrize("error", [FileNotFoundError("x"), FileExistsError("x"), KeyError("bug")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, storage_errors("read"):
        raise error
    assert caught.value is error


def test_dataset_in_memory() -> None:
    folder = f"memory://{uuid.uuid4().hex}"
    store = open_store(folder)
    for name in ("b.parquet", "a/a.parquet", "_tmp/c.parquet", "a/note.txt"):
        store.put(name, name.encode())
    base, stats = find_files(folder)
    assert [stat.path.removeprefix(f"{base}/") for stat in stats] == ["a/a.parquet", "b.parquet"]
    assert [stat.size for stat in stats] == [11, 9]
    with open_input(stats[0].path, folder) as file:
        assert file.read() == b"a/a.parquet"
    (one,) = find_files(f"{folder}/a/*.parquet")[1]
    assert one == stats[0]


def test_a_changed_file_has_another_etag(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"1")
    before = find_files(str(path))[1][0]
    os.utime(path, (1, 1))
    after = find_files(str(path))[1][0]
    assert (before.path, before.size) == (after.path, after.size)
    assert before.etag != after.etag


def test_find_files_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_files(str(tmp_path / "x"))
    with pytest.raises(InputError, match=r"it has no \.parquet file"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("end", ["", "/"])
def test_a_slash_at_the_end_means_nothing(end: str, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"1")
    base, _ = find_files(f"{tmp_path}{end}")
    store = open_store(f"{tmp_path}{end}")
    assert (base, store.root, store.url) == (str(tmp_path), str(tmp_path), str(tmp_path))


def test_temporary_files_of_a_living_run_are_left_alone(disk: Store) -> None:
    disk.put("a", b"1")
    half = Path(disk.path(f"{TEMPORARY}/half"))
    half.write_bytes(b"")
    disk.clear_temporary(older_than_s=60)
    assert half.exists()
    os.utime(half, (0, 0))
    disk.clear_temporary(older_than_s=60)
    assert not half.exists()


def test_put_new_works_where_there_are_no_links(
    disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert disk.put_new("name", b"one")
    assert not disk.put_new("name", b"two")
    assert disk.read("name") == b"one"


def test_an_output_that_is_a_file_stops_the_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="Not a directory"):
        open_store(str(tmp_path / "file")).put("data/x", b"1")


OUTSIDE = ["..", "../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/./b", "a\0b", "."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_a_store(name: str, store: Store) -> None:
    """A name from a foreign marker or tar must not become a path of this machine."""
    verbs: list[Callable[[], object]] = [
        lambda: store.path(name),
        lambda: store.read(name),
        lambda: store.open(name),
        lambda: store.put(name, b""),
        lambda: store.put_new(name, b""),
        lambda: store.delete(name),
        lambda: store.find(name),
        lambda: store.list(name),
        lambda: store.move("there", name),
        lambda: store.move(name, "there"),
    ]
    for verb in verbs:
        with pytest.raises(InputError, match="is not a valid name in it"):
            verb()


def test_only_regular_files_are_read(disk: Store, tmp_path: Path) -> None:
    """Reading waited forever for a pipe, and read a device until memory was full."""
    root = Path(disk.root)
    root.mkdir(exist_ok=True)
    os.mkfifo(root / "pipe")
    (root / "device").symlink_to("/dev/zero")
    (root / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        for verb in (disk.read, disk.open):
            with pytest.raises(InputError, match=f"{name} is not a regular file"):
                verb(name)


def test_a_record_of_a_size_that_no_run_writes_is_not_read(disk: Store) -> None:
    """A sparse plan.json of 10 GiB filled the memory."""
    disk.put("plan.json", b"{}")
    assert disk.read_record("plan.json") == b"{}"
    with open(disk.path("plan.json"), "r+b") as file:
        file.truncate(10 << 30)
    with pytest.raises(InputError, match=r"plan\.json has more than 1 GiB"):
        disk.read_record("plan.json")
    with pytest.raises(FileNotFoundError):
        disk.read_record("none.json")


def test_an_object_is_moved(store: Store) -> None:
    store.put("one", b"1")
    store.put("a/two", b"2")
    store.move("one", "a/two")
    assert store.read("a/two") == b"1"
    with pytest.raises(FileNotFoundError):
        store.read("one")
