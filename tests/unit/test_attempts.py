"""How past attempts decide the next: which samples crash a shard, and which crashes count."""

from __future__ import annotations

import pytest

from batchgen import attempts as module
from batchgen.attempts import DIED, MOST_LEFT_OUT, Attempt, Attempts, judge

HERE, GONE = "node-here", "node-gone"
LIVING = {HERE}


def died(*on: str, node: str = HERE) -> Attempt:
    return Attempt(node, on)


def test_a_first_attempt_is_recorded_once() -> None:
    attempts = Attempts()
    assert attempts.begin_first("Generate", 3, HERE)
    assert not attempts.begin_first("Generate", 3, HERE)
    assert attempts.begin_first("Decode", 3, HERE)
    assert attempts.past("Generate", 3) == [Attempt(HERE)]
    attempts.begin("Generate", 3, HERE)
    attempts.tell("Generate", 3, ("a", "b"))
    attempts.tell("Generate", 3, ("c",), "ValueError: no")
    assert attempts.past("Generate", 3) == [Attempt(HERE), Attempt(HERE, ("c",), "ValueError: no")]
    assert attempts.past("Generate", 4) == []


def test_a_record_that_was_begun_anew_takes_what_it_is_told() -> None:
    attempts = Attempts()
    attempts.tell("Generate", 3, ("a",), "ValueError: no")
    assert judge(attempts.past("Generate", 3), 3, LIVING).tries == 1


def test_what_went_with_its_node_does_not_count() -> None:
    past = [died(node=GONE)] * 20
    judged = judge(past, 3, LIVING)
    assert (judged.begun, judged.tries, judged.hopeless) == (20, 0, None)
    assert judge([*past, died("a"), died("a")], 3, LIVING).tries == 2


def test_a_failure_with_its_reason_counts_wherever_its_node_is() -> None:
    assert judge([Attempt(GONE, (), "ValueError: no")], 3, LIVING).tries == 1


def test_deaths_on_nothing_particular_give_the_shard_up() -> None:
    assert judge([died(), died()], 3, LIVING).hopeless is None
    assert judge([died(), died(), died()], 3, LIVING).hopeless == f"{DIED} in each of 3 attempts"


def test_an_untold_death_is_followed_by_one_that_tells() -> None:
    assert judge([Attempt(HERE)], 1, LIVING).hopeless is None
    assert judge([Attempt(HERE), died()], 1, LIVING).hopeless is not None


def test_suspects_are_tried_alone_and_then_left_out() -> None:
    past = [Attempt(HERE), died("a", "b", "c"), died("a", "b", "c")]
    judged = judge(past, 3, LIVING)
    assert judged.alone == {"a", "b", "c"} and not judged.without
    past.append(died("b"))
    judged = judge(past, 3, LIVING)
    assert judged.without == {"b": DIED} and judged.alone == {"a", "b", "c"}
    assert judged.hopeless is None


def test_variants_of_a_row_that_cannot_be_told_apart_are_left_out_together() -> None:
    past = [died("a-v0", "a-v1")] * 2
    assert judge(past, 1, LIVING).without == {"a-v0": DIED, "a-v1": DIED}


def test_a_shard_of_many_failing_samples_is_given_up() -> None:
    past = [Attempt(HERE, (f"s{n}",), f"ValueError: {n}") for n in range(MOST_LEFT_OUT)]
    judged = judge(past, 1, LIVING)
    assert len(judged.without) == MOST_LEFT_OUT and judged.hopeless is None
    past.append(Attempt(HERE, ("s9",), "ValueError: 9"))
    assert judge(past, 1, LIVING).hopeless == "ValueError: 9"


def test_what_nobody_has_loaded_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts({"Generate": 3})
    attempts.load_begins("Generate", "a")
    attempts.load_begins("Generate", "b")
    attempts.load_begins("Decode", "c")
    attempts.load_ends("Decode", "c", loaded=True)
    attempts.load_ends("Generate", "a", loaded=False)
    assert attempts.may_load("Generate") is None  # b is not done
    attempts.load_ends("Generate", "b", loaded=False)
    assert attempts.may_load("Generate") is None  # a third is being started
    monkeypatch.setattr(module, "STARTED_WITHIN_S", 0.0)
    assert attempts.may_load("Generate") is False


def test_what_another_has_loaded_is_tried_again_while_the_stage_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    attempts = Attempts()
    for replica in ("a", "b"):
        attempts.load_begins("Generate", replica)
        attempts.load_ends("Generate", replica, loaded=replica == "a")
    for _ in range(3):
        now[0] += module.SILENT_FOR_S - 1
        attempts.load_begins("Generate", "b")
        attempts.load_ends("Generate", "b", loaded=False)
        assert attempts.may_load("Generate") is True
        attempts.begin_first("Generate", int(now[0]), HERE)
    now[0] += module.SILENT_FOR_S + 1
    attempts.load_begins("Generate", "b")  # its own attempts are no sign of life
    attempts.load_ends("Generate", "b", loaded=False)
    assert attempts.may_load("Generate") is False


def test_the_only_replica_that_loses_its_model_has_no_hope() -> None:
    attempts = Attempts()
    for loaded in (True, False):
        attempts.load_begins("Generate", "a")
        attempts.load_ends("Generate", "a", loaded=loaded)
    assert attempts.may_load("Generate") is False


def test_the_same_words_are_told_once() -> None:
    attempts = Attempts()
    for words in ("a cannot start", "a cannot start", "b cannot start"):
        attempts.say(words)
    assert attempts.news(0).said == ["a cannot start", "b cannot start"]
    assert attempts.news(1).said == ["b cannot start"]
