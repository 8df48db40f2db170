"""`batchgen push` uploads an output to a stand-in for the Hugging Face Hub, and continues."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen.output.ledger import Ledger
from batchgen.progress.display import Tally
from batchgen.report.finalize import finalize
from batchgen.storage import open_store
from tests import hub as stand_in
from tests.arithmetic_stages import make_output
from tests.datasets_on_disk import plan_for, prompts, write_columns
from tests.hub import Blob, Hub, Repo

NAME = "team/images"
PLACE = f"hf://datasets/{NAME}"
SHARDS = 4
ABOUT = {"README.md", "_batchgen/contact-sheet.png"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an output of 4 shards for each format; a row of each is rejected."""
    folder = tmp_path_factory.mktemp("push")
    texts = [*prompts(7), ""]
    path = write_columns(folder / "a.parquet", {"prompt": texts, "kind": ["x", "y"] * 4})
    for name in ("parquet", "webdataset", "image-folder"):
        fields = {"output__format": name, "output__samples_per_shard": 2}
        plan = plan_for(path, folder / name, input__columns__label="kind", **fields)
        ledger = Ledger(open_store(str(folder / name)))
        make_output(plan, ledger)
        finalize(plan, ledger, Tally(plan.shards, plan.samples))
    return folder


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "parquet", tmp_path / "out"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with stand_in.running() as hub:
        yield hub


def start(
    out: Path, hub: Hub, home: Path, *more: str, token: str = stand_in.TOKEN
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "batchgen", "push", str(out), "--to", PLACE, *more]
    return subprocess.Popen(
        command,
        env=hub.environment(home, token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def push(
    out: Path, hub: Hub, home: Path, *more: str, token: str = stand_in.TOKEN
) -> tuple[int, str]:
    """Exit code, and everything that was printed."""
    process = start(out, hub, home, *more, token=token)
    told = process.communicate(timeout=120)
    return process.returncode, "".join(told)


def data_of(out: Path) -> dict[str, bytes]:
    files = [path for path in (out / "data").rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def expected(out: Path) -> dict[str, bytes]:
    return data_of(out) | {name: (out / name).read_bytes() for name in ABOUT}


@pytest.mark.parametrize("name", ["parquet", "webdataset", "image-folder"])
def test_the_data_the_sheet_and_the_card_are_uploaded_once(
    name: str, whole: Path, hub: Hub, tmp_path: Path
) -> None:
    out = whole / name
    code, told = push(out, hub, tmp_path, "--private", "--message", "Digits")
    assert code == 0, told
    repo = hub.repos[NAME]
    assert hub.files(NAME) == expected(out)
    assert repo.private
    assert [(title, set(paths)) for _, title, paths in repo.commits] == [
        ("Digits", set(data_of(out))),
        ("Digits", ABOUT),
    ]
    uploads = list(hub.uploads)
    assert len(set(uploads)) == len(uploads)
    code, told = push(out, hub, tmp_path, "--json")
    assert code == 0, told
    said = json.loads(told)
    count = len(expected(out))
    assert said == {
        **{"place": PLACE, "files": count, "kept": count, "sent": 0, "bytes": 0, "commits": 0}
    }
    assert hub.uploads == uploads and len(repo.commits) == 2


def test_the_hub_s_library_downloads_what_was_pushed(out: Path, hub: Hub, tmp_path: Path) -> None:
    assert push(out, hub, tmp_path)[0] == 0
    code = (
        "import sys; from huggingface_hub import snapshot_download\n"
        f"print(snapshot_download({NAME!r}, repo_type='dataset', local_dir=sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "copy")]
    subprocess.run(command, env=hub.environment(tmp_path), check=True, capture_output=True)
    assert data_of(tmp_path / "copy") == data_of(out)
    assert (tmp_path / "copy/README.md").read_bytes() == (out / "README.md").read_bytes()


def test_a_killed_push_continues(out: Path, hub: Hub, tmp_path: Path) -> None:
    reached, released = threading.Event(), threading.Event()

    def block_the_third_upload(method: str, path: str) -> int | None:
        if method == "PUT" and len(hub.uploads) >= 2:
            reached.set()
            released.wait(60)
            return 503
        return None

    hub.before = block_the_third_upload
    process = start(out, hub, tmp_path)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    hub.before = lambda method, path: None
    released.set()
    before = list(hub.uploads)
    assert 2 <= len(before) < SHARDS + 1
    assert hub.files(NAME) == {}
    code, told = push(out, hub, tmp_path)
    assert code == 0, told
    assert hub.files(NAME) == expected(out)
    assert sorted(hub.uploads) == sorted(set(hub.uploads)), "nothing is uploaded twice"
    assert hub.uploads[: len(before)] == before


def test_a_push_killed_between_commits_sends_only_the_rest(
    out: Path, hub: Hub, tmp_path: Path
) -> None:
    reached, released = threading.Event(), threading.Event()

    def block_the_card(method: str, path: str) -> int | None:
        if path.endswith("/commit/main") and hub.repos[NAME].commits:
            reached.set()
            released.wait(60)
            return 503
        return None

    hub.before = block_the_card
    process = start(out, hub, tmp_path)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    hub.before = lambda method, path: None
    released.set()
    assert hub.files(NAME) == data_of(out)
    code, told = push(out, hub, tmp_path)
    assert code == 0 and f"{len(ABOUT)} uploaded" in told
    assert [set(paths) for _, _, paths in hub.repos[NAME].commits] == [set(data_of(out)), ABOUT]


def test_a_commit_whose_answer_was_lost_is_not_repeated(
    out: Path, hub: Hub, tmp_path: Path
) -> None:
    failures = [503, None]

    def lose_the_first_answer(method: str, path: str) -> int | None:
        return failures.pop(0) if path.endswith("/commit/main") and failures else None

    hub.after = lose_the_first_answer
    code, told = push(out, hub, tmp_path)
    assert code == 0, told
    assert [set(paths) for _, _, paths in hub.repos[NAME].commits] == [set(data_of(out)), ABOUT]


def test_a_branch_of_its_own(out: Path, hub: Hub, tmp_path: Path) -> None:
    assert push(out, hub, tmp_path, "--revision", "v2")[0] == 0
    assert hub.files(NAME, "v2") == expected(out)
    assert hub.files(NAME) == {}


def test_a_changed_file_replaces_the_old_one(out: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME] = Repo(False)
    name = "data/train-00001-of-00004.parquet"
    size = (out / name).stat().st_size
    hub.repos[NAME].branches["main"] = {name: Blob(b"x" * size, True)}
    assert push(out, hub, tmp_path)[0] == 0
    assert hub.files(NAME) == expected(out)


def test_data_files_of_others_are_refused(out: Path, hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME] = Repo(False)
    hub.repos[NAME].branches["main"] = {"data/train-00000-of-00009.parquet": Blob(b"x", True)}
    code, told = push(out, hub, tmp_path)
    assert code == 1 and "1 data files that are not of this output (data/train-00000-of-" in told
    assert hub.uploads == []


def test_a_public_dataset_is_refused_if_it_should_be_private(
    out: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.repos[NAME] = Repo(False)
    code, told = push(out, hub, tmp_path, "--private")
    assert code == 1 and "exists and is public, but --private was given" in told
    assert hub.files(NAME) == {}


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_without_a_token_that_may_write_it_says_how_to_log_in(
    token: str, out: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, told = push(out, hub, tmp_path, token=token)
    assert code == 1 and "`hf auth login`" in told and "Traceback" not in told
    assert not token or token not in told


def test_a_hub_that_cannot_be_reached_can_be_tried_again(
    out: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.url = "http://127.0.0.1:9"  # the discard port, which nobody serves
    code, told = push(out, hub, tmp_path)
    assert code == 3 and "push again later: it continues" in told and "Traceback" not in told


def test_an_output_that_is_damaged_or_not_finished_is_refused(
    out: Path, hub: Hub, tmp_path: Path
) -> None:
    path = out / "data/train-00001-of-00004.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    code, told = push(out, hub, tmp_path)
    assert code == 4 and "train-00001-of-00004.parquet is missing or damaged" in told
    path.write_bytes(hashlib.sha256(whole).digest() + whole[32:])
    code, told = push(out, hub, tmp_path)
    assert code == 4 and "train-00001-of-00004.parquet is missing or damaged" in told
    (out / "_batchgen/shards/00001.json").unlink()
    code, told = push(out, hub, tmp_path)
    assert code == 1 and "1 of 4 shards are pending or failed (1)" in told
    assert hub.uploads == []


def test_a_card_of_the_user_is_the_card_on_the_hub(out: Path, hub: Hub, tmp_path: Path) -> None:
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (out / "_batchgen/README.md").write_text("# batchgen's\n")
    assert push(out, hub, tmp_path)[0] == 0
    assert hub.files(NAME)["README.md"].endswith(b"# Mine\n")
    assert hub.files(NAME) == expected(out)
