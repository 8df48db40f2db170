"""Faults between batchgen and a real S3 server: each is retried or ends with a clear message."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from batchgen.errors import InputError, StorageFailed
from batchgen.output.lease import acquire_lease
from batchgen.storage import (
    Limits,
    abort,
    configure,
    find_files,
    open_input,
    open_store,
    unfinished_uploads,
)
from tests.object_store.proxy import FaultProxy, Rule
from tests.object_store.server import OTHER_KEY, OTHER_SECRET, S3Server

PART = 5 << 20
BODY = bytes(range(256)) * 64  # 16 KiB
QUICK = Limits(connect_timeout_s=2, read_timeout_s=1, patience_s=2, part_bytes=PART)
STEADY = Limits(connect_timeout_s=5, read_timeout_s=3, patience_s=20, part_bytes=PART)


@pytest.fixture
def steady(s3_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """A store behind the proxy, with a retry time limit that is enough for a busy machine."""
    configure(limits=STEADY)
    yield s3_proxy


@pytest.fixture
def quick(s3_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """A store behind the proxy, with a short retry time limit."""
    configure(limits=QUICK)
    yield s3_proxy


PASSING = {
    "slow-down": Rule("error", times=3),
    "internal-error": Rule("error", status=500, code="InternalError", times=2),
    "reset": Rule("reset", times=2),
    "cut-body": Rule("cut-body", times=2),
    "lost": Rule("lost", times=1),
    "latency": Rule("latency", times=4),
    "hang": Rule("hang", times=1, seconds=30),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("verb", ["put", "put_new"])
def test_what_passes_costs_nothing_when_writing(
    fault: str, verb: str, steady: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    rule = Rule(**{**vars(PASSING[fault]), "method": "PUT"})
    steady.rules(rule)
    assert getattr(store, verb)("data/x", BODY) in (None, True)
    assert steady.faults(), "the fault never happened"
    steady.rules()
    assert store.read("data/x") == BODY
    assert store.list("data") == {"x": len(BODY)}


@pytest.mark.parametrize("fault", [*sorted(PASSING.keys() - {"cut-body"}), "cut"])
def test_what_passes_costs_nothing_when_reading(
    fault: str, steady: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    store.put("data/x.parquet", BODY)
    fault_rule = PASSING.get(fault) or Rule("cut", times=2)
    rule = Rule(**{**vars(fault_rule), "method": "GET", "target": "x.parquet"})
    steady.rules(rule)
    assert store.read("data/x.parquet") == BODY
    assert steady.faults(), "the fault never happened"
    steady.rules(Rule(**{**vars(fault_rule), "method": "GET", "target": "x.parquet"}))
    _, (stat,) = find_files(f"{s3_bucket}/out")
    with open_input(stat.path, s3_bucket, stat.etag) as file:
        file.seek(1000)
        assert file.read(5000) == BODY[1000:6000]
    assert steady.faults()


def test_a_lost_answer_to_a_create_is_told_from_a_conflict(
    steady: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    steady.rules(Rule("lost", method="PUT", times=1))
    assert store.put_new("marker.json", b"mine")
    assert [seen.status for seen in steady.log if seen.method == "PUT"] == [200, 412]
    assert not store.put_new("marker.json", b"theirs")
    assert store.read("marker.json") == b"mine"


def test_a_lease_is_taken_in_spite_of_what_passes(steady: FaultProxy, s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/out")
    # The listing of the leases, the look at the last one, and the creation of the next.
    for method, target in (
        ("GET", "prefix=out%2F_batchgen%2Flease"),
        ("GET", "_batchgen/lease/00001"),
        ("PUT", "_batchgen/lease/00003"),
    ):
        steady.rules(Rule("error", method=method, target=target, times=2))
        acquire_lease(store).release()
        assert steady.faults() == ["error"] * 2


@pytest.mark.parametrize("step", ["partNumber=2", "uploads", "uploadId=[^&]*$"])
@pytest.mark.parametrize("kind", ["error", "reset", "lost"])
def test_multipart_uploads_survive_and_leave_nothing(
    step: str, kind: Any, steady: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    body = BODY * (2 * PART // len(BODY)) + b"end"
    steady.rules(Rule(kind, method="PUT|POST", target=step, times=1))
    store.put("data/big", body)
    assert steady.faults() == [kind]
    parts = [seen for seen in steady.log if "partNumber" in seen.target]
    assert len(parts) == (4 if step == "partNumber=2" else 3), "more was sent again than was lost"
    steady.rules()
    assert store.read("data/big") == body
    left = unfinished_uploads(store)
    assert len(left) == (1 if (kind, step) == ("lost", "uploads") else 0)
    for upload in left:
        abort(store, upload)
    assert unfinished_uploads(store) == []


def test_parts_on_their_way_are_waited_for_before_an_upload_is_aborted(
    steady: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    steady.rules(
        Rule("error", target="partNumber=1", status=403, code="AccessDenied"),
        Rule("latency", target="partNumber=[23]", seconds=1),
    )
    with pytest.raises(StorageFailed, match=r"cannot write .*/out/data/big: AccessDenied"):
        store.put("data/big", bytes(2 * PART + 1))
    assert [seen.method for seen in steady.log][-1] == "DELETE"
    assert sum("partNumber" in seen.target for seen in steady.log) == 3
    steady.rules()
    assert unfinished_uploads(store) == []


def test_an_upload_that_somebody_aborts_is_begun_again(steady: FaultProxy, s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/out")
    gone = Rule("error", target="partNumber=2", status=404, code="NoSuchUpload", times=1)
    steady.rules(gone)
    store.put("data/big", bytes(2 * PART + 1))
    assert steady.faults() == ["error"]
    assert store.list("data") == {"big": 2 * PART + 1}
    assert unfinished_uploads(store) == []


def test_an_upload_that_cannot_be_completed_is_begun_again(
    steady: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens if the gateway that handled the upload has crashed."""
    monkeypatch.setattr("batchgen.storage.uploads.COMPLETE_WITHIN_S", 0.5)
    store = open_store(f"{s3_bucket}/out")
    stuck = Rule("error", method="POST", target="uploadId", status=500, code="InternalError")
    steady.rules(stuck)
    writer = threading.Thread(target=store.put, args=("data/big", bytes(2 * PART + 1)))
    writer.start()
    while sum(seen.target.endswith("?uploads") for seen in steady.log) < 2:
        assert writer.is_alive()
        time.sleep(0.01)
    stuck.times = 0
    writer.join(30)
    assert store.list("data") == {"big": 2 * PART + 1}
    assert unfinished_uploads(store) == []


def test_a_failed_upload_is_not_visible_and_clean_up_finds_only_ours(
    quick: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    beside = open_store(f"{s3_bucket}/out-other")
    bucket = s3_bucket.removeprefix("s3://")
    for key in ("out-other/data/x", "out/theirs/x"):
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    quick.rules(
        Rule("error", target="partNumber=2"), Rule("reset", method="DELETE", target="uploadId")
    )
    with pytest.raises(StorageFailed, match=r"cannot write .*/out/data/big: .*retried for 2 s"):
        store.put("data/big", bytes(2 * PART + 1))
    quick.rules()
    assert store.list("data") == {}
    left = unfinished_uploads(store)
    assert left and {upload.name for upload in left} == {"data/big"}
    for upload in left:
        abort(store, upload)
        abort(store, upload)  # gone already
    assert unfinished_uploads(store) == []
    assert len(unfinished_uploads(beside)) == 1


FOR_GOOD = {
    "slow-down": Rule("error"),
    "internal-error": Rule("error", status=500, code="InternalError"),
    "reset": Rule("reset"),
    "hang": Rule("hang", seconds=30),
    "lost": Rule("cut", after_bytes=0),
}


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_what_does_not_pass_ends_in_time_with_the_objects_name(
    fault: str, quick: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    quick.rules(FOR_GOOD[fault])
    began = time.monotonic()
    with pytest.raises(StorageFailed) as caught:
        store.read("data/x")
    assert time.monotonic() - began < QUICK.patience_s + 2 * 3 + 5
    assert f"cannot read {s3_bucket}/out/data/x: " in str(caught.value)
    assert "resume" in str(caught.value)


def test_a_peer_that_does_not_read_ends_in_time(s3_proxy: FaultProxy, s3_bucket: str) -> None:
    configure(limits=replace(QUICK, part_bytes=32 << 20, slowest_bytes_per_s=32 << 20))
    store = open_store(f"{s3_bucket}/out")
    s3_proxy.rules(Rule("hang", seconds=60))
    began = time.monotonic()
    with pytest.raises(StorageFailed, match="FSTimeoutError"):
        store.put("data/x", bytes(32 << 20))
    assert time.monotonic() - began < 20


REFUSALS = [
    ("ExpiredToken", 400, "get a new session token"),
    ("InvalidAccessKeyId", 403, "check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", 403, "check AWS_SECRET_ACCESS_KEY"),
    ("AccessDenied", 403, "check the bucket's policy"),
    ("RequestTimeTooSkewed", 403, "clock is wrong"),
    ("QuotaExceeded", 403, "free some space"),
]


@pytest.mark.parametrize(("code", "status", "remedy"), REFUSALS)
def test_refusals_are_not_tried_again(
    code: str, status: int, remedy: str, steady: FaultProxy, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    steady.rules(Rule("error", status=status, code=code))
    with pytest.raises(StorageFailed) as caught:
        store.put("data/x", BODY)
    assert f"{s3_bucket}/out/data/x" in str(caught.value) and remedy in str(caught.value)
    assert len(steady.log) == 1


def test_real_refusals(
    s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(f"{s3_bucket}/out").put("there", BODY)
    cases: list[tuple[dict[str, str], str]] = [
        ({"key": "${K}", "secret": "${WRONG}"}, "SignatureDoesNotMatch"),
        ({"key": "${WRONG}", "secret": "${S}"}, "InvalidAccessKeyId"),
        ({"key": "${K}", "secret": "${S}"}, "AccessDenied"),
    ]
    monkeypatch.setenv("K", OTHER_KEY)
    monkeypatch.setenv("S", OTHER_SECRET)
    monkeypatch.setenv("WRONG", "wrong-wrong-wrong")
    for options, code in cases:
        configure({"s3": options}, QUICK)
        with pytest.raises(StorageFailed, match=code) as caught:
            open_store(f"{s3_bucket}/out").put("x", BODY)
        assert "wrong-wrong" not in str(caught.value) and OTHER_SECRET not in str(caught.value)
    configure(limits=QUICK)
    with pytest.raises(StorageFailed, match="NoSuchBucket; the bucket does not exist"):
        open_store("s3://no-such-bucket-here/out").put("x", BODY)
    with pytest.raises(InputError, match="no such file or folder"):
        find_files("s3://no-such-bucket-here/in")


def test_keys_that_were_put_right_count_from_the_next_run_of_the_same_process(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong-wrong-wrong")
        configure()
        with pytest.raises(StorageFailed, match="SignatureDoesNotMatch"):
            open_store(f"{s3_bucket}/out").put("x", BODY)
    configure()
    store = open_store(f"{s3_bucket}/out")
    store.put("x", BODY)
    assert store.read("x") == BODY


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("s3:PutObject", lambda store: store.put("x", BODY)),
        ("s3:GetObject", lambda store: store.read("there")),
        ("s3:ListBucket", lambda store: store.list("")),
    ],
)
def test_a_policy_that_denies_is_named(
    action: str, call: Callable[[Any], Any], s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    store.put("there", BODY)
    bucket = s3_bucket.removeprefix("s3://")
    statement = {
        "Effect": "Deny",
        "Principal": {"AWS": ["arn:aws:iam:::user/test"]},
        "Action": action,
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    store.fs.call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
    with pytest.raises(StorageFailed, match=rf"cannot .*{s3_bucket}/out") as caught:
        call(store)
    assert "AccessDenied" in str(caught.value) or "permission denied" in str(caught.value)


def test_one_of_many_writers_creates_a_name(s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/out")
    assert store.supports_create_only()
    gate = threading.Barrier(12)
    won: list[int] = []

    def reach(number: int) -> None:
        gate.wait()
        if store.put_new("prize", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=reach, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("prize") == str(won[0]).encode()


def test_an_input_that_was_replaced_is_found_out(s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/in")
    store.put("a.parquet", BODY)
    _, (stat,) = find_files(f"{s3_bucket}/in")
    with open_input(stat.path, s3_bucket, stat.etag) as file:
        assert file.read(10) == BODY[:10]
        store.put("a.parquet", BODY[::-1])
        with pytest.raises(InputError, match="it was changed meanwhile"):
            file.read(10)
    with pytest.raises(InputError, match="has changed: planned with etag"):
        open_input(stat.path, s3_bucket, stat.etag)


def test_only_what_is_asked_for_is_read(s3_proxy: FaultProxy, s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/in")
    store.put("a.parquet", BODY * 100)
    s3_proxy.rules()
    with open_input(f"{store.root}/a.parquet", s3_bucket) as file:
        file.seek(500_000)
        assert len(file.read(1000)) == 1000
    gets = [seen for seen in s3_proxy.log if seen.method == "GET" and "a.parquet" in seen.target]
    assert len(gets) == 1 and gets[0].status == 206


def test_a_gateway_that_dies_and_comes_back_costs_seconds(
    s3_server: S3Server, s3_bucket: str
) -> None:
    store = open_store(f"{s3_bucket}/out")
    store.put("before", BODY)
    s3_server.kill_gateway()
    back = threading.Timer(2, s3_server.start_gateway)
    back.start()
    try:
        store.put("after", BODY)
    finally:
        back.join()
    assert store.read("before") == store.read("after") == BODY
