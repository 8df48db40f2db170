"""Submits jobs to a Ray cluster's job server, and finds, follows and stops them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import batchgen
from batchgen.cluster.addresses import REACH, check_job_server, no_job_server
from batchgen.cluster.ray_token import close_token
from batchgen.errors import Interrupted, SpecError, UsageError
from batchgen.secrets import redact
from batchgen.spec.spec import Spec
from batchgen.storage import absolute
from batchgen.storage.cache import cache_folder

PACKAGE = Path(batchgen.__file__).parent
ENTRY_POINT = PACKAGE.parent / "jobs" / "ray_job.py"
SPEC_FILE = "job.yaml"
OUTPUT = "batchgen_output"  # of the job's metadata on the cluster
ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}
STOP_WAIT_S = 60  # time for the driver to release its lease
READY_WITHIN_S = 60.0
POLL_S = 1.0
RECONNECTS = 10
SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
ID_ALLOWED = "allowed are letters, digits, '.', '_' and '-', up to 200, a letter or digit first"
CLUSTERS = ("ray",)  # packages that the cluster has, in its own version
QUIET = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TOKEN_REMEDY = (
    "the cluster requires its token: put it into RAY_AUTH_TOKEN, or name its file in "
    "RAY_AUTH_TOKEN_PATH (on the head it is ~/.ray/auth_token), and set RAY_AUTH_MODE=token"
)
CURATE = "curate"  # the extra that a quota needs


def requirements(extras: Sequence[str] = ()) -> list[str]:
    """batchgen's requirements and those of extras, pinned to the versions installed here.

    Ray is that of the cluster. What an extra needs and this machine lacks is left out.
    """
    pins = []
    for line in importlib.metadata.requires("batchgen") or []:
        wanted = Requirement(line)
        marker = wanted.marker if "extra" in str(wanted.marker) else None
        if wanted.name in CLUSTERS or (
            marker and not any(marker.evaluate({"extra": one}) for one in extras)
        ):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if marker:
                continue
            raise
        public = Version(found).public  # torch 2.13.0+cpu
        pins.append(f"{wanted.name}=={public}")
    return sorted(pins)


class Cluster:
    """A client of a Ray cluster's job server.

    Raises:
        UsageError: nothing answers at the address, or the server refuses; says what to do.
    """

    def __init__(self, address: str | None = None) -> None:
        given = address or DEFAULT_ADDRESS
        self.address = given if "://" in given else f"http://{given}"
        # Ray's client prefers this variable to its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for name in ("ray", *QUIET):  # they log connections, uploads and tokens
            logging.getLogger(name).setLevel(logging.ERROR)
        close_token()
        # Turns on token authentication if there is a token, as `ray start` does.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        check_job_server(self.address)
        with self._answering():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        spec: Spec,
        options: Sequence[str] = (),
        submission_id: str | None = None,
        packages: bool = True,
    ) -> str:
        """Submit a spec with ``options`` of ``batchgen run``; returns the submission id.

        The package, the spec and, with ``packages``, the pinned requirements are sent along.
        Secrets are not: the spec only names them.
        """
        facts = {"batchgen_task": spec.task, "batchgen_model": redact(spec.model.path)}
        files = {SPEC_FILE: spec.to_yaml()}
        words, url = ["run", SPEC_FILE, *options], spec.output.url
        extras = [] if spec.quota is None else [CURATE]
        return self._start(words, url, files, facts, submission_id, packages, extras)

    def resume(self, output: str, options: Sequence[str] = (), packages: bool = True) -> str:
        """Submit a job that resumes an output; ``options`` are those of ``batchgen resume``."""
        words = ["resume", output, *options]  # the job may have a quota
        return self._start(words, output, {}, {}, None, packages, [CURATE])

    def _start(
        self,
        words: list[str],
        output: str,
        files: dict[str, str],
        facts: dict[str, str],
        submission_id: str | None,
        packages: bool,
        extras: Sequence[str] = (),
    ) -> str:
        name = submission_id or f"batchgen-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        if not SUBMISSION_ID.fullmatch(name):
            raise SpecError("--submission-id", name, ID_ALLOWED)
        environment: dict[str, Any] = {
            "py_modules": [str(PACKAGE)],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        }
        if packages:
            environment["pip"] = {"packages": requirements(extras), "pip_check": False}
        with tempfile.TemporaryDirectory() as folder:
            for file, text in files.items():
                (Path(folder) / file).write_text(text)
            start = ["python", "-m", "batchgen"]  # an installed package has no jobs/ folder
            if ENTRY_POINT.exists():
                start = ["python", shutil.copy(ENTRY_POINT, folder).rpartition("/")[2]]
            environment["working_dir"] = folder
            with self._answering():
                accepted = self._accepted(
                    entrypoint=shlex.join([*start, *words]),
                    submission_id=name,
                    runtime_env=environment,
                    metadata={OUTPUT: output, "batchgen_version": batchgen.__version__, **facts},
                )
        if not SUBMISSION_ID.fullmatch(accepted):  # it becomes a file name on this machine
            raise UsageError(f"{self.address} gave the job the id {accepted!r}; {ID_ALLOWED}")
        _remember(accepted, output)
        return accepted

    def _accepted(self, **job: Any) -> str:
        """Submit it; a head that has just started gets READY_WITHIN_S to accept jobs."""
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def find(self, job: str) -> JobDetails | None:
        """The job with this submission id, or the last one that was submitted for this output."""
        with self._answering():
            jobs = [one for one in self._client.list_jobs() if one.submission_id]
        same = [
            one
            for one in jobs
            if job == one.submission_id
            or absolute(job).rstrip("/") == (one.metadata or {}).get(OUTPUT, "").rstrip("/")
        ]
        return max(same, key=lambda one: one.start_time or 0, default=None)

    def follow(self, submission_id: str) -> Iterator[str]:
        """Yields what the job prints until it has ended; reconnects if the connection is lost."""
        said = failures = 0
        while True:
            skip = said
            try:
                for text in _blocking(self._client.tail_job_logs(submission_id)):
                    fresh, skip = text[skip:], max(0, skip - len(text))
                    said += len(fresh)
                    if fresh:
                        failures = 0
                        yield fresh
            except Exception as error:
                failures += 1
                if failures > RECONNECTS:
                    raise Interrupted(
                        f"the connection to {self.address} is lost ({error}); the job "
                        f"continues: follow it with `batchgen logs --follow {submission_id}`"
                    ) from error
            found = self.find(submission_id)
            if found is None or found.status in ENDED:
                return
            time.sleep(POLL_S)

    def logs(self, submission_id: str) -> str:
        with self._answering():
            return str(self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> bool:
        """Ask the job to stop; False if it has already ended."""
        with self._answering():
            return bool(self._client.stop_job(submission_id))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = redact(str(error)).strip()
            kind = type(error).__name__
            if "Authentication" in kind or "token" in said.lower():
                raise UsageError(f"{self.address}: {TOKEN_REMEDY}") from error
            if isinstance(error, ConnectionError) or "Connection" in kind:
                raise UsageError(f"{no_job_server(self.address)}; {REACH}") from error
            if isinstance(error, RuntimeError | ValueError):
                raise UsageError(f"{self.address}: {said}") from error
            raise


def output_of(job: str) -> str:
    """The output of a job that was submitted from this machine, or ``job`` itself if it is one.

    Raises:
        UsageError: it is a submission id that is not known on this machine.
    """
    if not SUBMISSION_ID.fullmatch(job):
        return job
    try:
        return _record(job).read_text()
    except FileNotFoundError:
        if os.path.isdir(job):
            return job
        raise UsageError(
            f"job {job} was not submitted from this machine, so its output is not known here: "
            "give the output instead"
        ) from None


def _remember(name: str, output: str) -> None:
    _record(name).parent.mkdir(parents=True, exist_ok=True)
    _record(name).write_text(output)


def _record(name: str) -> Path:
    return cache_folder() / "jobs" / f"{name}.output"


def exit_code(job: JobDetails) -> int:
    """The exit code of batchgen in a job that has ended; 3 if the job was stopped or lost."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code
    return code if code in (1, 2, 3, 4) else 3


def _blocking(stream: AsyncIterator[str]) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(stream))
            except StopAsyncIteration:
                return
    finally:
        loop.close()
