"""The watchdog: how often it looks, when it stops, and that no slow look holds up the end."""

from __future__ import annotations

import threading

import pytest

from batchgen.watchdog import watchdog


def test_it_looks_until_the_block_ends() -> None:
    looked, often = list[int](), threading.Event()

    def look() -> None:
        looked.append(1)
        if len(looked) == 3:
            often.set()

    with watchdog("test", look, 0.001):
        assert often.wait(30)
    after = len(looked)
    assert not [one for one in threading.enumerate() if one.name == "test"]
    assert after == len(looked) >= 3


def test_it_stops_at_the_first_true_look() -> None:
    looked = list[int]()
    told = threading.Event()

    def look() -> bool:
        looked.append(1)
        told.set()
        return True

    with watchdog("test", look, 0.001, at_end=True):
        assert told.wait(30)
    assert looked == [1]


@pytest.mark.parametrize(("at_end", "calls"), [(True, 1), (False, 0)])
def test_the_last_look_is_asked_for(at_end: bool, calls: int) -> None:
    looked = list[int]()
    with (
        pytest.raises(ValueError, match="of the block"),
        watchdog("test", lambda: looked.append(1), 3600.0, at_end=at_end),
    ):
        raise ValueError("of the block")
    assert len(looked) == calls


def test_a_look_that_hangs_does_not_hold_up_the_end() -> None:
    release, hangs = threading.Event(), threading.Event()

    def look() -> None:
        hangs.set()
        release.wait(30)

    with watchdog("hangs", look, 0.001, wait_s=0.01):
        assert hangs.wait(30)
    assert [one.name for one in threading.enumerate() if one.name == "hangs"] == ["hangs"]
    release.set()
