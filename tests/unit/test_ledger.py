"""The ledger: markers, states of shards, and leases."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.errors import (
    DamagedRecord,
    InputError,
    NewerFormat,
    OutputBusy,
    PlanChanged,
    StorageFailed,
)
from batchgen.output import lease as lease_module
from batchgen.output.lease import (
    LEASE_SECONDS,
    LEASES,
    Lease,
    acquire_lease,
    hold_lease,
    holders_of,
)
from batchgen.output.ledger import Ledger, data_name, rejects_name
from batchgen.output.marker import Counts, FailedMarker, Marker, Written, parse_failed, parse_marker
from batchgen.output.outcome import take_stock
from batchgen.storage import Store, open_store
from tests.datasets_on_disk import paper_plan, spec_for

MARKER = Marker(
    shard=3,
    counts=Counts(planned=4, accepted=2, rejected=1, failed=1),
    files=(
        Written("data/train-00003-of-00005.parquet", 100, "a" * 64, 2),
        Written("_batchgen/rejects/00003.parquet", 50, "b" * 64, 2),
    ),
    reasons={"empty-prompt": 1, "non-finite": 1},
    truncated_prompts=1,
    timings_s={"encode": 0.1},
    read_bytes=7,
    batch_size=2,
    micro_batches=2,
    parameter_counts={"denoiser": {"unet": 5}},
    attempt=2,
    environment={"host": "h"},
    spec_fingerprint="f" * 64,
    finished_at=1.5,
)
FAILURE = FailedMarker(3, 4, "ValueError", "it broke", "Traceback ...", 2, "h", 9.5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 0.02)


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return Ledger(store)


def test_marker_round_trip(ledger: Ledger) -> None:
    assert parse_marker(MARKER.to_json()) == MARKER
    assert ledger.commit(MARKER) == MARKER
    assert ledger.marker(3) == MARKER
    assert ledger.marker(4) is None


def test_failed_marker_round_trip(ledger: Ledger) -> None:
    ledger.fail(FAILURE)
    assert ledger.failures([3]) == [FAILURE]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"counts": {}, "files": []}'])
def test_what_is_no_marker_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedRecord, match=r"^the marker is damaged \(.+\); mend it$"):
        parse_marker(data, remedy="mend it")


def test_counts_add_up() -> None:
    assert Counts(4, 2, 1, 1).add_up()
    assert not Counts(4, 2, 1, 0).add_up()


def test_names_sort_in_the_order_of_shards() -> None:
    names = [data_name(shard, 1200) for shard in (0, 9, 10, 999, 1199)]
    assert names == sorted(names)
    assert names[0] == "data/train-00000-of-01200.parquet"
    assert rejects_name(7) == "_batchgen/rejects/00007.parquet"


def test_states_come_from_one_listing_each(ledger: Ledger) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    assert ledger.states(plan).pending == [0, 1, 2, 3, 4]
    ledger.commit(replace(MARKER, shard=1))
    ledger.commit(MARKER)
    ledger.fail(replace(FAILURE, shard=4))
    ledger.store.put("_batchgen/shards/notes.txt", b"not a marker")
    states = ledger.states(plan)
    assert (states.committed, states.failed) == ({1, 3}, {4})
    assert states.pending == [0, 2, 4]


def test_a_commit_ends_an_earlier_failure(ledger: Ledger) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    ledger.fail(FAILURE)
    assert ledger.states(plan).failed == {3}
    ledger.commit(MARKER)
    assert ledger.states(plan).failed == frozenset()
    assert ledger.failures([3]) == []


def test_a_failure_does_not_undo_a_commit(ledger: Ledger) -> None:
    """A retried attempt may fail late, after another attempt has committed."""
    plan = paper_plan([[5]], output__samples_per_shard=1)
    ledger.commit(MARKER)
    ledger.fail(FAILURE)
    states = ledger.states(plan)
    assert (states.committed, states.failed) == ({3}, frozenset())


def test_a_second_attempts_commit_yields_the_first(ledger: Ledger) -> None:
    ledger.commit(MARKER)
    again = replace(MARKER, attempt=9, finished_at=77.0)
    assert ledger.commit(again) == MARKER
    assert ledger.marker(3) == MARKER


def put_files(ledger: Ledger, marker: Marker, data: bytes) -> Marker:
    """Write ``data`` as every file of the marker; returns a marker that names it."""
    digest = hashlib.sha256(data).hexdigest()
    files = tuple(replace(one, bytes=len(data), sha256=digest) for one in marker.files)
    for file in files:
        ledger.store.put(file.name, data)
    return replace(marker, files=files)


def test_the_first_marker_wins_while_its_files_are_there(ledger: Ledger) -> None:
    first = put_files(ledger, MARKER, b"first")
    ledger.commit(first)
    late = replace(MARKER, files=(Written("_batchgen/rejects/00009.parquet", 4, "c" * 64, 4),))
    ledger.store.put("_batchgen/rejects/00009.parquet", b"late")
    ledger.store.put("_batchgen/schemas/0.arrow", b"of all shards")
    more = (*late.files, Written("_batchgen/schemas/0.arrow", 4, "d" * 64, 0))
    assert ledger.commit(replace(late, files=more)) == first
    assert ledger.marker(3) == first
    assert list(ledger.store.list("_batchgen/rejects")) == ["00003.parquet"]
    assert ledger.store.list("_batchgen/schemas")


def test_a_marker_whose_files_were_replaced_is_replaced_as_well(ledger: Ledger) -> None:
    """If two attempts found no marker, the marker must name the files that were written last."""
    ledger.commit(put_files(ledger, MARKER, b"first"))
    last = put_files(ledger, MARKER, b"last")
    assert ledger.commit(last) == last == ledger.marker(3)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000])
def test_a_damaged_marker_is_made_again(ledger: Ledger, data: bytes) -> None:
    ledger.store.put("_batchgen/shards/00003.json", data)
    plan = paper_plan([[5]], output__samples_per_shard=1)
    assert ledger.committed(plan, 3) is None
    assert list(ledger.markers([3])) == []
    assert ledger.commit(MARKER) == MARKER == ledger.marker(3)


def test_a_marker_of_another_plan_is_neither_adopted_nor_replaced(ledger: Ledger) -> None:
    foreign = replace(MARKER, plan_fingerprint="1" * 64)
    ledger.commit(foreign)
    with pytest.raises(PlanChanged, match=r"00003\.json belongs to another plan"):
        ledger.commit(replace(MARKER, plan_fingerprint="2" * 64))
    plan = paper_plan([[5]], output__samples_per_shard=1)
    with pytest.raises(PlanChanged, match="generates the shard again"):
        ledger.committed(plan, 3)
    with pytest.raises(PlanChanged, match="other inputs, settings or weights"):
        take_stock(plan, ledger, ledger.states(plan))
    assert ledger.marker(3) == foreign


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path, store: Store) -> None:
    store.put("_batchgen/plan.json", b"{}")
    placed = Ledger(store.in_place())
    (tmp_path / "out").rename(tmp_path / "moved")
    for write in (
        lambda: placed.commit(MARKER),
        lambda: placed.fail(FAILURE),
        lambda: placed.log(1, ["x"]),
        lambda: placed.store.put("data/x", b""),
    ):
        with pytest.raises(StorageFailed, match="out no longer exists: it was deleted or moved"):
            write()
    assert not (tmp_path / "out").exists()


def test_markers_come_in_order_of_shard(ledger: Ledger) -> None:
    for shard in (4, 0, 2):
        ledger.commit(replace(MARKER, shard=shard))
    assert [marker.shard for marker in ledger.markers({2, 4, 0, 1})] == [0, 2, 4]


def test_an_output_holds_its_plan_and_its_job(ledger: Ledger) -> None:
    assert ledger.plan() is None
    plan = paper_plan([[5]], output__url=ledger.store.url)
    job = spec_for("/in", seed=4)
    ledger.freeze(plan, job)
    assert (ledger.require_plan(), ledger.job()) == (plan, job)


def test_an_output_that_nothing_was_run_into(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="no run has started there"):
        ledger.require_plan()
    with pytest.raises(InputError, match="no run has started there"):
        ledger.job()


def test_the_second_run_is_refused_with_the_holders_name(store: Store) -> None:
    lease = acquire_lease(store)
    with pytest.raises(OutputBusy) as caught:
        acquire_lease(store)
    host, pid, *_ = lease.owner.split(" ")
    assert f"(host {host}, pid {pid}, since {time.strftime('%H:')}" in str(caught.value)
    assert store.url in str(caught.value)
    assert f"try again in {LEASE_SECONDS:.0f} s" in str(caught.value)


def test_one_of_twelve_racing_threads_gets_the_lease(store: Store) -> None:
    for held_before in (False, True, False):
        if held_before:
            expire(store)
        gate, leases, refused = threading.Barrier(12), list[Lease](), list[str]()
        threads = [
            threading.Thread(target=reach, args=(store, gate, leases, refused)) for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(leases), len(refused)) == (1, 11)
        leases[0].release()


def reach(store: Store, gate: threading.Barrier, leases: list[Lease], refused: list[str]) -> None:
    gate.wait()
    try:
        leases.append(acquire_lease(store))
    except OutputBusy as error:
        refused.append(str(error))


def lease_of(store: Store, number: int) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(store.read(f"{LEASES}/{number:05d}.json"))
    return tree


def expire(store: Store) -> None:
    """As if the holder had last renewed long ago, on another machine."""
    number = len(store.list(LEASES))
    tree = {
        "owner": "elsewhere 1 x",
        "renewed_at": time.time() - LEASE_SECONDS - 1,
        "released": False,
    }
    store.put(f"{LEASES}/{number:05d}.json", json.dumps(tree).encode())


def test_a_released_lease_can_be_taken_next(store: Store) -> None:
    first = acquire_lease(store)
    first.release()
    second = acquire_lease(store)
    assert (first.number, second.number) == (1, 2)
    assert lease_of(store, 1)["released"]
    assert second.still_held()
    assert not first.still_held()


def test_an_expired_lease_can_be_taken(store: Store) -> None:
    acquire_lease(store)
    expire(store)
    said: list[str] = []
    assert acquire_lease(store, say=said.append).number == 2
    assert "(host elsewhere, pid 1)" in said[0] and "to see whether it still runs" in said[0]


def put_lease(store: Store, number: int, **facts: Any) -> None:
    tree = {"owner": "elsewhere 1 x", "renewed_at": time.time(), "released": False, **facts}
    store.put(f"{LEASES}/{number:05d}.json", json.dumps(tree).encode())


@pytest.mark.parametrize("off_s", [-600.0, 600.0, 10 * 365 * 86400.0])
def test_a_lease_by_another_clock_is_watched(store: Store, off_s: float) -> None:
    """Whichever clock is wrong, a live run keeps its lease; a dead run's lease blocks nobody."""
    put_lease(store, 1, renewed_at=time.time() + off_s)

    def beat(words: str) -> None:
        put_lease(store, 1, renewed_at=time.time() + off_s + 10)

    with pytest.raises(OutputBusy, match="held by another run"):
        acquire_lease(store, say=beat)
    assert acquire_lease(store).number == 2


def test_a_lease_that_was_taken_over_is_not_watched_again(store: Store) -> None:
    put_lease(store, 1, renewed_at=1.0)
    put_lease(store, 2, renewed_at=1.0, shards=[0, 4])
    put_lease(store, 3, released=True)
    said: list[str] = []
    assert acquire_lease(store, say=said.append).number == 4
    assert said == []


def test_a_run_of_a_part_leaves_others_to_be_watched(store: Store) -> None:
    put_lease(store, 1, renewed_at=1.0)
    put_lease(store, 2, shards=[0, 4], released=True)
    said: list[str] = []
    assert acquire_lease(store, (0, 4), said.append).number == 3
    assert len(said) == 1


@pytest.mark.parametrize(
    "data", [b"{}", b"[]", b"null", b"{", b"[" * 100_000, b'{"owner": 3, "renewed_at": "x"}']
)
def test_a_lease_that_cannot_be_read_holds_nothing(store: Store, data: bytes) -> None:
    store.put(f"{LEASES}/00001.json", data)
    assert holders_of(store) == []
    assert acquire_lease(store).number == 2


def test_a_lease_of_a_later_version_is_refused_by_name(store: Store) -> None:
    put_lease(store, 1, version=9)
    with pytest.raises(NewerFormat, match=r"lease/00001\.json was written by a newer batchgen"):
        acquire_lease(store)


def test_a_lease_tells_how_its_run_ended(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), hold_lease(store, print):
        raise ZeroDivisionError("by\nzero")
    with hold_lease(store, print) as lease:
        lease.ending = "8 images"
    first, second = holders_of(store)
    assert (first.ending, first.at_work) == ("ZeroDivisionError: by zero", False)
    assert (second.ending, second.released) == ("8 images", True)


@pytest.mark.parametrize("what", ["moved", "deleted", "plan"])
def test_an_output_that_is_gone_ends_its_run(
    store: Store, fast_heart: None, tmp_path: Path, what: str
) -> None:
    lease = acquire_lease(store)
    store.put("_batchgen/plan.json", b"{}")
    lease.witness = "_batchgen/plan.json"
    if what == "moved":
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    elif what == "deleted":
        shutil.rmtree(tmp_path / "out")
    else:
        (tmp_path / "out/_batchgen/plan.json").unlink()
    told: list[str] = []
    lease.keep(told.append)
    assert told == [
        f"output {store.url} was deleted or moved during the run; "
        "if it was moved, `resume` it where it is now"
    ]
    lease.release()
    assert (tmp_path / "out").exists() == (what == "plan")


def test_another_machines_lease_is_waited_for(store: Store) -> None:
    """This machine cannot see whether the other machine's process is alive."""
    tree = {"owner": "elsewhere 999999 x", "renewed_at": time.time(), "released": False}
    store.put(f"{LEASES}/00001.json", json.dumps(tree).encode())
    with pytest.raises(OutputBusy, match="host elsewhere, pid 999999"):
        acquire_lease(store)


def test_a_beat_renews(store: Store) -> None:
    lease = acquire_lease(store)
    expire(store)
    lease.beat()
    with pytest.raises(OutputBusy):
        acquire_lease(store)


DIE_HOLDING = """
import os, sys
from batchgen.output.lease import acquire_lease
from batchgen.storage import open_store
acquire_lease(open_store(sys.argv[1]))
os._exit(9)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_dead_process_on_this_machine_holds_nothing(store: Store) -> None:
    ended = subprocess.run([sys.executable, "-c", DIE_HOLDING, store.url], check=False)
    assert ended.returncode == 9
    assert not lease_of(store, 1)["released"]
    assert time.time() - lease_of(store, 1)["renewed_at"] < LEASE_SECONDS / 2
    assert acquire_lease(store).number == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_dead_process_that_nobody_has_reaped_holds_nothing(store: Store) -> None:
    ended = subprocess.Popen([sys.executable, "-c", DIE_HOLDING, store.url])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{ended.pid}/stat").exists()
    assert acquire_lease(store).number == 2
    ended.wait()


@pytest.fixture
def fast_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.001)


def test_a_lost_lease_is_noticed(store: Store, fast_heart: None) -> None:
    lease = acquire_lease(store)
    expire(store)
    acquire_lease(store)
    told: list[str] = []
    lease.keep(told.append)
    assert told == ["another run has taken over this output's lease"]
    assert lease.lost.is_set()
    lease.release()
    assert not lease_of(store, 1)["released"]  # the holder's history is left as it is


def test_a_lease_that_cannot_be_renewed_is_lost(
    store: Store, fast_heart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = acquire_lease(store)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", -1.0)
    monkeypatch.setattr(Store, "put", _refuse)
    told: list[str] = []
    lease.keep(told.append)
    assert len(told) == 1
    assert "could not be renewed for -1 s: the disk is full" in told[0]


def _refuse(*_: object) -> None:
    raise StorageFailed("the disk is full")


def test_holding_a_lease_renews_and_releases_it(store: Store, fast_heart: None) -> None:
    beats = threading.Event()
    told: list[str] = []
    with hold_lease(store, told.append) as lease:
        before = lease_of(store, 1)["renewed_at"]
        while lease_of(store, 1)["renewed_at"] == before:
            beats.wait(0.001)
        assert lease.still_held()
    assert lease_of(store, 1)["released"]
    assert told == []


def test_a_lease_is_released_when_the_run_breaks(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), hold_lease(store, print):
        raise ZeroDivisionError
    assert acquire_lease(store).number == 2


def test_runs_of_other_shards_do_not_meet(store: Store) -> None:
    first, second = acquire_lease(store, (0, 4)), acquire_lease(store, (4, 9))
    assert first.still_held() and second.still_held()
    for part in ((3, 5), (8, 20), None):
        with pytest.raises(OutputBusy, match="held by another run"):
            acquire_lease(store, part)
    with pytest.raises(OutputBusy, match="shards 4:9"):
        acquire_lease(store, (4, 5))
    first.release()
    third = acquire_lease(store, (1, 2))
    assert third.still_held() and second.still_held() and not first.still_held()
    assert [holder.at_work for holder in holders_of(store)] == [False, True, True]


def test_racing_runs_of_other_shards_all_get_their_lease(store: Store) -> None:
    gate, leases = threading.Barrier(6), list[Lease]()

    def take(number: int) -> None:
        gate.wait()
        leases.append(acquire_lease(store, (number, number + 1)))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.number for lease in leases) == [1, 2, 3, 4, 5, 6]
    assert all(lease.still_held() for lease in leases)


def test_a_half_written_lease_of_a_store_holds_nothing(store: Store) -> None:
    store.put(f"{LEASES}/00001.json", b"")
    assert acquire_lease(store).number == 2


def test_a_plan_is_frozen_once(tmp_path: Path) -> None:
    ledger = Ledger(open_store(str(tmp_path)))
    first, other = paper_plan([[3]], seed=1), paper_plan([[3]], seed=2)
    assert ledger.freeze(first, first.spec)
    assert not ledger.freeze(other, other.spec)
    assert ledger.job().seed == ledger.require_plan().spec.seed == 1


@pytest.mark.parametrize("kept", [40, 3, 0])
def test_a_damaged_job_is_named(tmp_path: Path, kept: int) -> None:
    ledger = Ledger(open_store(str(tmp_path)))
    plan = paper_plan([[3]])
    ledger.freeze(plan, plan.spec)
    ledger.store.put(
        "_batchgen/job.yaml", plan.spec.to_yaml().encode()[:kept] + b"\xff" * (kept == 3)
    )
    with pytest.raises(
        InputError, match=r"(?s)_batchgen/job\.yaml is not a valid spec.*batchgen run"
    ):
        ledger.job()


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    ledger = Ledger(open_store(str(tmp_path)))
    ledger.store.put("_batchgen/plan.json", paper_plan([[3]]).to_json().encode()[:200])
    with pytest.raises(DamagedRecord, match=r"_batchgen/plan\.json is damaged .*a new output"):
        ledger.plan()


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    ledger = Ledger(open_store(str(tmp_path)))
    ledger.store.put("_batchgen/shards/00004.json", b"{")
    with pytest.raises(DamagedRecord, match=r"00004\.json is damaged .*generates the shard again"):
        ledger.marker(4)


def test_a_marker_under_another_name_is_not_adopted(ledger: Ledger) -> None:
    plan = paper_plan([[5]], output__samples_per_shard=1)
    for name in ("3.json", "003.json", "\u0663.json", "00003.json.json", "-0003.json"):
        ledger.store.put(f"_batchgen/shards/{name}", MARKER.to_json())
    assert ledger.states(plan).pending == [0, 1, 2, 3, 4]
    ledger.store.put("_batchgen/shards/00002.json", MARKER.to_json())
    with pytest.raises(DamagedRecord, match=r"00002\.json is the marker of shard 3"):
        ledger.marker(2)
    assert "3.json" in ledger.strays(plan) and "00002.json" not in ledger.strays(plan)


def test_unknown_fields_are_ignored_and_missing_ones_defaulted() -> None:
    tree = json.loads(MARKER.to_json())
    assert parse_marker(json.dumps({**tree, "colour": {"of": ["later"]}}).encode()) == MARKER
    old = {name: tree[name] for name in ("shard", "counts", "files", "spec_fingerprint")}
    marker = parse_marker(json.dumps(old).encode())
    assert (marker.version, marker.plan_fingerprint, marker.reasons) == (1, None, {})
    assert parse_failed(b'{"shard": 3, "more": 1}') == FailedMarker(3)


@pytest.mark.parametrize("parse", [parse_marker, parse_failed])
@pytest.mark.parametrize("extra", [{}, {"shard": "3", "counts": "in another file"}])
def test_a_record_of_a_later_version_is_refused_by_name(
    parse: Callable[[bytes, str], object], extra: dict[str, str]
) -> None:
    tree = {**json.loads(MARKER.to_json()), "version": 7, **extra}
    with pytest.raises(NewerFormat) as refused:
        parse(json.dumps(tree).encode(), "out/00003.json")
    assert str(refused.value) == (
        "out/00003.json was written by a newer batchgen (format 7; this version reads up to 1): "
        "use the newer version"
    )


def test_a_marker_is_of_the_plan_whose_fingerprint_it_holds() -> None:
    plan, other = paper_plan([[5]]), paper_plan([[4]])  # one spec, two inputs
    assert plan.fingerprints.spec == other.fingerprints.spec
    marker = replace(
        MARKER, spec_fingerprint=plan.fingerprints.spec, plan_fingerprint=plan.fingerprint
    )
    assert marker.is_of(plan) and not marker.is_of(other)
    old = replace(marker, plan_fingerprint=None)
    assert old.is_of(plan) and old.is_of(other)
    assert not old.is_of(paper_plan([[5]], seed=3))


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[" * 100_000, b'{"shard": "x"}'])
def test_a_damaged_failed_marker_still_says_that_its_shard_failed(
    ledger: Ledger, data: bytes
) -> None:
    ledger.store.put("_batchgen/failed/00003.json", data)
    (failure,) = ledger.failures([3, 4])
    assert failure.shard == 3
    assert "failed/00003.json is damaged" in failure.message
    assert "retries the shard" in failure.message


def test_a_plan_of_huge_numbers_costs_no_memory(ledger: Ledger) -> None:
    plan = paper_plan([[2**53]], output__samples_per_shard=1)
    ledger.commit(MARKER)
    assert ledger.states(plan).committed == {3}


def test_the_same_host_name_on_another_boot_is_no_neighbour(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    lease = acquire_lease(store)
    host, pid, place, _, *rest = lease.owner.split(" ")
    lease.owner = " ".join([host, pid, "00000000-1", "1", *rest])
    lease.beat()
    with pytest.raises(OutputBusy):
        acquire_lease(store)
    lease.owner = " ".join([host, pid, place, "1", *rest])  # this pid, begun at another time
    lease.beat()
    assert acquire_lease(store).number == lease.number + 1
