"""Permanent faults: each ends the job in time and is named; once repaired, `resume` finishes it.

    python -m tests.chaos.permanent --results FILE.json [--only KIND] FOLDER

For every kind a run goes from a real S3 server through a proxy; once its first shard is committed
(or its plan is written, where the input is the matter) the fault begins and stays. What ended must
have the right exit code, one message that names the object, and nothing wrong in storage. Then the
fault is mended, and `resume` must come to the bytes of a run that nobody disturbed.
The full disk needs root: it is a small tmpfs. Kinds that stand in the results already are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.ledger import PLAN, Ledger
from batchgen.output.verify import verify
from batchgen.storage import Store, configure, open_store
from tests.chaos.store import digests
from tests.object_store.proxy import FaultProxy, Rule
from tests.object_store.server import S3Server, make_bucket

BUCKET = "permanent"
FILES, ROWS_OF_FILE, PER_SHARD = 6, 16, 4
ENDS_WITHIN_S = 90.0
LONGEST_S = 300.0


@dataclass
class Place:
    """The environment of one run: the server, the proxy before it, and its input and output."""

    server: S3Server
    proxy: FaultProxy
    source: Store
    output: str
    folder: Path

    def policy(self, *actions: str, below: str) -> None:
        """Deny what the run's user may do below a prefix of the bucket."""
        statement = {
            "Effect": "Deny",
            "Principal": {"AWS": ["arn:aws:iam:::user/test"]},
            "Action": list(actions),
            "Resource": [f"arn:aws:s3:::{BUCKET}/{below}*"],
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self.source.fs.call_s3("put_bucket_policy", Bucket=BUCKET, Policy=policy)

    @property
    def prefix(self) -> str:
        return self.output.removeprefix(f"s3://{BUCKET}/")

    @property
    def last_input(self) -> str:
        return f"{FILES - 1:02d}.parquet"


@dataclass(frozen=True)
class Kind:
    """How and when a fault begins, how it is repaired, and what the job must report."""

    begin: Callable[[Place], object]
    mend: Callable[[Place], object]
    exit_code: int = 3
    says: str = "resume"
    after_plan: bool = False
    on_disk: bool = False


@dataclass(frozen=True)
class Ended:
    """The result for one kind of fault."""

    kind: str
    exit_code: int
    seconds: float
    committed: int
    message: str
    resumed: int
    problems: list[str]


def _rules(*rules: Rule) -> Callable[[Place], object]:
    return lambda place: place.proxy.rules(*rules)


def _by_proxy(rule: Rule, says: str = "resume") -> Kind:
    return Kind(_rules(rule), _rules(), says=says)


def _by_policy(*actions: str, whole: bool = False) -> Kind:
    return Kind(
        lambda place: place.policy(*actions, below="" if whole else f"{place.prefix}/data/"),
        lambda place: place.source.fs.call_s3("delete_bucket_policy", Bucket=BUCKET),
        says="check",
    )


def _replace_last(place: Place) -> None:
    rows = pa.table({"prompt": [f"a blue circle {row}" for row in range(ROWS_OF_FILE)]})
    pq.write_table(rows, place.folder / "other.parquet")
    place.source.put(place.last_input, (place.folder / "other.parquet").read_bytes())


def _put_back(place: Place) -> None:
    place.source.put(place.last_input, (place.folder / place.last_input).read_bytes())


def _remount(size: str) -> Callable[[Place], object]:
    def call(place: Place) -> None:
        words = ["mount", "-o", f"remount,size={size}", str(place.folder / "disk")]
        subprocess.run(words, check=True)

    return call


def _fill(place: Place) -> None:
    """Fill the disk, as files of others would."""
    used = subprocess.run(
        ["du", "-s", "--block-size=4096", str(place.folder / "disk")],
        capture_output=True,
        text=True,
        check=True,
    )
    blocks = int(used.stdout.split()[0])
    _remount(str((blocks + 1) * 4096))(place)


KINDS: dict[str, Kind] = {
    "slow-down": _by_proxy(Rule("error")),
    "internal-error": _by_proxy(Rule("error", status=500, code="InternalError")),
    "reset": _by_proxy(Rule("reset")),
    "cut-answer": _by_proxy(Rule("cut", after_bytes=1)),
    "cut-body": _by_proxy(Rule("cut-body", after_bytes=1)),
    "lost-answers": _by_proxy(Rule("lost", method="PUT|POST")),
    "hang": _by_proxy(Rule("hang", seconds=900)),
    "wrong-key": _by_proxy(
        Rule("error", status=403, code="InvalidAccessKeyId"), "check AWS_ACCESS_KEY_ID"
    ),
    "wrong-secret": _by_proxy(
        Rule("error", status=403, code="SignatureDoesNotMatch"), "check AWS_SECRET_ACCESS_KEY"
    ),
    "expired-token": _by_proxy(Rule("error", status=400, code="ExpiredToken"), "token"),
    "missing-bucket": _by_proxy(
        Rule("error", method="PUT|GET", status=404, code="NoSuchBucket"),
        "the bucket does not exist",
    ),
    "denied-prefix": _by_policy("s3:PutObject"),
    "read-only-bucket": _by_policy("s3:PutObject", "s3:DeleteObject", whole=True),
    "gateway-killed": Kind(
        lambda place: place.server.kill_gateway(), lambda place: place.server.start_gateway()
    ),
    "vanished-input": Kind(
        lambda place: place.source.delete(place.last_input),
        _put_back,
        exit_code=1,
        says="is missing",
        after_plan=True,
    ),
    "changed-input": Kind(
        _replace_last, _put_back, exit_code=1, says="has changed", after_plan=True
    ),
    "full-disk": Kind(_fill, _remount("64m"), says="free some space", on_disk=True),
}


def command(source: str, output: str) -> list[str]:
    settings = {
        "output.samples_per_shard": PER_SHARD,
        "sampling.num_inference_steps": 12,
        "resources.batch_size": 4,
        "resources.generate": "{min_replicas: 1, max_replicas: 1}",
    }
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "batchgen", "run", "--input", source, "--output", output, *sets]


def try_kind(name: str, place: Place, quiet: object) -> Ended:
    """Run until the fault, check, repair it, resume."""
    kind = KINDS[name]
    with (place.folder / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(
            command(place.source.url, place.output), stdout=log, stderr=log, start_new_session=True
        )
        _wait_for_its_time(place, kind, process)
        kind.begin(place)
        began = time.monotonic()
        code = process.wait(LONGEST_S)
        seconds = round(time.monotonic() - began, 1)
        log.seek(0)
        said = log.read()
    kind.mend(place)
    problems = _problems(kind, place, code, seconds, said)
    ledger = Ledger(open_store(place.output))
    committed = len(ledger.states(ledger.require_plan()).committed)
    again = subprocess.run(
        [sys.executable, "-m", "batchgen", "resume", place.output], capture_output=True, text=True
    )
    if again.returncode:
        problems.append(f"resume: {again.stderr[-500:]}")
    problems += verify(ledger).problems
    if digests(place.output) != quiet:
        problems.append("not the samples of a quiet run")
    message = next((line for line in said.splitlines() if line.startswith("batchgen: ")), "")
    return Ended(name, code, seconds, committed, message, again.returncode, problems)


def _wait_for_its_time(place: Place, kind: Kind, process: subprocess.Popen[bytes]) -> None:
    store = Store(**{**vars(open_store(place.output)), "patience_s": 30.0})
    if store.local:
        store = open_store(place.output)
    while process.poll() is None:
        if kind.after_plan:
            if PLAN.rpartition("/")[2] in store.list("_batchgen"):
                return
        elif store.list("_batchgen/shards"):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the run ended before the fault could begin: {place.folder}")


def _problems(kind: Kind, place: Place, code: int, seconds: float, said: str) -> list[str]:
    messages = [line for line in said.splitlines() if line.startswith("batchgen: ")]
    problems = []
    if code != kind.exit_code:
        problems.append(f"exit code {code}, not {kind.exit_code}")
    if seconds > ENDS_WITHIN_S:
        problems.append(f"took {seconds} s to end")
    if len(messages) != 1 or "Traceback" in said:
        problems.append(f"{len(messages)} messages: {said[-800:]}")
    for word in (kind.says, BUCKET if not kind.on_disk else str(place.folder)):
        if messages and word not in messages[0]:
            problems.append(f"the message does not say {word!r}")
    problems += _wrong_in_storage(Ledger(open_store(place.output)))
    return problems


def _wrong_in_storage(ledger: Ledger) -> list[str]:
    """Problems other than missing shards and data files whose markers were not yet written."""
    expected = ("pending", "planned", "belongs to no committed shard", "failed;")
    found = verify(ledger).problems
    return [text for text in found if not any(word in text for word in expected)]


@contextmanager
def tmpfs(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def write_input(folder: Path, source: Store) -> None:
    for number in range(FILES):
        rows = {"prompt": [f"a red star {number} {row}" for row in range(ROWS_OF_FILE)]}
        name = f"{number:02d}.parquet"
        pq.write_table(pa.table(rows), folder / name)
        source.put(name, (folder / name).read_bytes())


def permanent(folder: Path, names: list[str]) -> Iterator[Ended]:
    """Try each kind of fault in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    server = S3Server(folder / f"server-{os.getpid()}")
    server.start()
    try:
        os.environ.update(server.exports)
        configure()
        make_bucket(server, BUCKET)
        source = open_store(f"s3://{BUCKET}/in")
        write_input(folder, source)
        quiet_url = str(folder / "quiet")
        subprocess.run(command(source.url, quiet_url), check=True, capture_output=True)
        quiet = digests(quiet_url)
        for name in names:
            with FaultProxy(server.port) as proxy:
                os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
                yield from _one(name, Place(server, proxy, source, "", folder), quiet)
    finally:
        server.stop()


def _one(name: str, place: Place, quiet: object) -> Iterator[Ended]:
    if not KINDS[name].on_disk:
        place.output = f"s3://{BUCKET}/{name}"
        yield try_kind(name, place, quiet)
        return
    with tmpfs(place.folder / "disk"):
        place.output = str(place.folder / "disk" / "out")
        yield try_kind(name, place, quiet)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=sorted(KINDS), action="append")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped on the way out
    ended: list[Ended] = []
    if options.results is not None and options.results.exists():
        ended = [Ended(**tree) for tree in json.loads(options.results.read_text())]
    done = {one.kind for one in ended}
    names = [name for name in options.only or KINDS if name not in done]
    for one in permanent(options.folder, names) if names else ():
        ended.append(one)
        print(
            f"{one.kind:<17} exit {one.exit_code} after {one.seconds:>5} s, {one.committed:>2} "
            f"committed, resume {one.resumed}  {one.message[:150]}",
            flush=True,
        )
        for problem in one.problems:
            print(f"    problem: {problem}", flush=True)
        if options.results is not None:
            options.results.write_text(json.dumps([asdict(one) for one in ended], indent=1) + "\n")
    return 1 if any(one.problems for one in ended) else 0


if __name__ == "__main__":
    sys.exit(main())
