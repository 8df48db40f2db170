"""Uploads a finished output to the Hugging Face Hub: data files in few commits, the card last."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchgen.errors import InputError, SpecError, StorageFailed, VerifyFailed
from batchgen.output.finished import refuse_unfinished
from batchgen.output.holdings import CARD
from batchgen.output.ledger import DATA, Ledger
from batchgen.storage import Store

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MAIN = "main"
MESSAGE = "Add images generated with batchgen"
COMMIT_FILES, COMMIT_BYTES = 2_000, 20 << 30  # the Hub allows 128 commits an hour
_UPLOAD_FILES, _UPLOAD_BYTES = 64, 256 << 20  # read and uploaded at a time
_OTHER_CARD = "_batchgen/README.md"  # the card, if README.md is a file of the user
_SHEET = "_batchgen/contact-sheet.png"
_PLACE = re.compile(r"hf://datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?")
_PAUSES_S = (1.0, 5.0, 20.0)  # between the tries of a commit
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class File:
    """A file to push: its name in the output and on the hub, and its size and SHA-256."""

    name: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class There:
    """A file on the hub: its size, its SHA-256 if it is a large file, else its git blob id."""

    bytes: int
    sha256: str | None
    blob: str


@dataclass
class Pushed:
    """What a push has done: files that were there already, files and bytes sent, and commits."""

    place: str
    files: int = 0
    kept: int = 0
    sent: int = 0
    bytes: int = 0
    commits: int = 0

    def text(self) -> str:
        return (
            f"{self.files} files are at {self.place}: {self.sent} uploaded "
            f"({self.bytes / 1e6:,.1f} MB), {self.kept} there already; {self.commits} commits"
        )


@dataclass(frozen=True)
class Push:
    """One push: from which store, to which dataset and branch."""

    store: Store
    hub: HfApi
    repo: str
    revision: str
    message: str
    say: Callable[[str], None]
    done: Pushed = field(default_factory=lambda: Pushed(""))


def push(
    source: Ledger,
    to: str,
    private: bool = False,
    revision: str = MAIN,
    message: str = MESSAGE,
    say: Callable[[str], None] = lambda words: None,
) -> Pushed:
    """Upload the data files, the contact sheet and the card of a finished output.

    Files that are on the hub with the same size and hash are not sent again, so an interrupted push
    continues. At the end, the hub's listing is compared with the output.

    Args:
        source: the output.
        to: ``hf://datasets/USER/NAME``; the dataset is created if there is none.
        private: create it as private; a public one that exists is refused.
        revision: a branch, created if there is none.
        message: of the commits.
        say: prints progress.

    Raises:
        SpecError: ``to`` has another form.
        InputError: the output is not finished, or the dataset has data files of others, is public,
            or may not be written.
        VerifyFailed: the output lost or changed files, or the hub does not list what was sent.
        StorageFailed: the hub cannot be reached, or fails.
    """
    found = _PLACE.fullmatch(to)
    if found is None:
        raise SpecError("--to", to, "hf://datasets/USER/NAME")
    parts = source.parts()
    refuse_unfinished(source, parts, then="push")
    data, about = _data_files(source, parts.numbers), _about_files(source.store)
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    job = Push(source.store, hub, found.group(1), revision, message, say, Pushed(to))
    with _hub_errors(to):
        _prepare(job, private)
        there = _listing(job)
        _refuse_others(job, data, there)
        for files in (data, about):
            _send(job, [one for one in files if not _is_there(job, one, there)])
        there = _listing(job)
    missing = [one.path for one in (*data, *about) if not _is_there(job, one, there)]
    if missing:
        raise VerifyFailed(
            f"{to} does not have {missing[0]} as it is in {source.store.url}, although it was "
            "uploaded (does a .gitignore of the dataset name it?); push again"
        )
    job.done.files = len(data) + len(about)
    job.done.kept = job.done.files - job.done.sent
    return job.done


def _data_files(source: Ledger, shards: range) -> list[File]:
    """The data files that the markers name, in the order of the shards."""
    sizes = source.store.find(DATA)
    files: list[File] = []
    for marker in source.markers(shards):
        for file in marker.files:
            if not file.name.startswith(f"{DATA}/"):
                continue  # rejects and schemas stay here
            if sizes.get(file.name.removeprefix(f"{DATA}/")) != file.bytes:
                raise _damaged(source.store, file.name)
            files.append(File(file.name, file.name, file.bytes, file.sha256))
    return files


def _damaged(store: Store, name: str) -> VerifyFailed:
    return VerifyFailed(
        f"{store.url}/{name} is missing or damaged, though committed; `batchgen verify {store.url} "
        f"--repair` withdraws its shard, then `batchgen resume {store.url}` regenerates it"
    )


def _about_files(store: Store) -> list[File]:
    """The contact sheet and the card, the card last: only with it, readers find the data."""
    pairs = [(_SHEET, _SHEET), (CARD, CARD) if _has(store, CARD) else (_OTHER_CARD, CARD)]
    files = []
    for name, path in pairs:
        if _has(store, name):
            data = store.read(name)
            files.append(File(name, path, len(data), hashlib.sha256(data).hexdigest()))
    return files


def _has(store: Store, name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return base in store.list(folder)


def _prepare(job: Push, private: bool) -> None:
    """Create the dataset and the branch, if they are not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = job.hub.repo_info(job.repo, repo_type="dataset")
    except RepositoryNotFoundError:
        job.hub.create_repo(job.repo, repo_type="dataset", private=private or None, exist_ok=True)
    else:
        if private and not info.private:
            raise InputError(
                f"the dataset {job.repo} exists and is public, but --private was given; make it "
                "private on the hub, or choose another name"
            )
    if job.revision != MAIN:
        job.hub.create_branch(job.repo, branch=job.revision, repo_type="dataset", exist_ok=True)


def _listing(job: Push) -> dict[str, There]:
    """Path -> size and hash of every file of the branch."""
    from huggingface_hub.hf_api import RepoFile

    found = job.hub.list_repo_tree(
        job.repo, recursive=True, revision=job.revision, repo_type="dataset"
    )
    return {
        one.path: There(one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)
        for one in found
        if isinstance(one, RepoFile)
    }


def _refuse_others(job: Push, data: Sequence[File], there: dict[str, There]) -> None:
    """Refuse a dataset with other data files: readers would take them for this output's."""
    ours = {one.path for one in data}
    others = sorted(path for path in there if path.startswith(f"{DATA}/") and path not in ours)
    if others:
        raise InputError(
            f"the dataset {job.repo} ({job.revision}) has {len(others)} data files that are not of "
            f"this output ({others[0]}); remove them there, or choose another name or --revision"
        )


def _is_there(job: Push, file: File, there: dict[str, There]) -> bool:
    found = there.get(file.path)
    if found is None or found.bytes != file.bytes:
        return False
    if found.sha256 is not None:
        return found.sha256 == file.sha256
    return found.blob == _blob(job.store.read(file.name))


def _blob(data: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _send(job: Push, files: Sequence[File]) -> None:
    """Upload files and commit them, many at a time."""
    batches = list(_batches(files, COMMIT_FILES, COMMIT_BYTES))
    for number, batch in enumerate(batches, start=1):
        operations: list[CommitOperationAdd] = []
        for part in _batches(batch, _UPLOAD_FILES, _UPLOAD_BYTES):
            some = [_operation(job.store, file) for file in part]
            job.hub.preupload_lfs_files(job.repo, some, repo_type="dataset", revision=job.revision)
            operations += some
        more = f" ({number} of {len(batches)})" if len(batches) > 1 else ""
        _commit(job, batch, operations, job.message + more)
        job.done.commits += 1
        job.done.sent += len(batch)
        job.done.bytes += sum(file.bytes for file in batch)
        job.say(f"committed {len(batch)} files to {job.done.place}{more}")


def _batches(files: Sequence[File], most: int, most_bytes: int) -> Iterator[list[File]]:
    """Consecutive files, at most ``most`` and, unless a single one is larger, ``most_bytes``."""
    batch: list[File] = []
    for file in files:
        size = sum(one.bytes for one in batch) + file.bytes if batch else 0
        if batch and (len(batch) >= most or size > most_bytes):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _operation(store: Store, file: File) -> CommitOperationAdd:
    """The upload of a file, whose bytes are those that its marker says."""
    from huggingface_hub import CommitOperationAdd

    try:
        data: Any = store.path(file.name) if store.local else store.read(file.name)
        operation = CommitOperationAdd(file.path, data)
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(store, file.name) from error
    if operation.upload_info.sha256.hex() != file.sha256:
        raise _damaged(store, file.name)
    return operation


def _commit(
    job: Push, batch: Sequence[File], operations: list[CommitOperationAdd], message: str
) -> None:
    """Commit uploaded files. An answer that is lost does not give a second commit."""
    for pause_s in (*_PAUSES_S, None):
        try:
            job.hub.create_commit(
                job.repo,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=job.revision,
            )
            return
        except Exception as error:
            if pause_s is None or not _may_pass(error):
                raise
        time.sleep(pause_s)
        there = _listing(job)
        if all(_is_there(job, file, there) for file in batch):
            return


@contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Turn errors of the hub's library into errors that say what to do; others pass."""
    try:
        yield
    except Exception as error:
        if not _is_of_hub(error):
            raise
        status = _status(error)
        said = " ".join(str(_root(error)).split())
        if status in (401, 403):
            raise InputError(f"{place} may not be written ({said}); {_LOGIN}") from error
        if isinstance(_root(error), ValueError) or not _may_pass(error):
            raise InputError(f"{place}: the hub refuses ({said})") from error
        raise StorageFailed(
            f"{place} cannot be reached or fails ({said}); push again later: it continues"
        ) from error


def _root(error: BaseException) -> BaseException:
    """The error of the request, under the library's own ones."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response = getattr(_root(error), "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_hub(error: BaseException) -> bool:
    """Whether the hub's library or its HTTP client raised it."""
    root, last = _root(error), error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    places = [kind.__module__ for kind in type(root).__mro__]
    places += [] if last is None else [str(last.tb_frame.f_globals.get("__name__"))]
    return any(place.startswith(("httpx", "huggingface_hub")) for place in places)


def _may_pass(error: BaseException) -> bool:
    """Whether a later try may succeed: the hub is busy, or the network failed."""
    status = _status(error)
    return _is_of_hub(error) and (status is None or status in (408, 409, 412, 429) or status >= 500)
