"""Errors: their classes, their messages, and that they survive the way to another process."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator

import pytest

import batchgen.storage  # it has a class of its own below StorageFailed
from batchgen.errors import (
    BatchgenError,
    InputError,
    OutOfMemory,
    RejectRow,
    SpecError,
    StorageFailed,
    UsageError,
    from_facts,
    shown,
    to_facts,
)

assert batchgen.storage
SPECIAL: dict[type[BatchgenError], BatchgenError] = {
    RejectRow: RejectRow("empty-prompt", "the prompt is empty"),
    OutOfMemory: OutOfMemory("decode", "CUDA out of memory"),
    SpecError: SpecError("sampling.width", 60, "a multiple of 8"),
}


def classes(kind: type[BatchgenError] = BatchgenError) -> Iterator[type[BatchgenError]]:
    """The errors that may leave an actor."""
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == BatchgenError.__module__:
            yield from classes(below)


def one_of(kind: type[BatchgenError]) -> BatchgenError:
    return SPECIAL[kind] if kind in SPECIAL else kind("something is wrong")


@pytest.mark.parametrize("kind", [*classes()])
def test_every_error_is_the_same_after_pickling(kind: type[BatchgenError]) -> None:
    error = one_of(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)


@pytest.mark.parametrize("kind", [*classes()])
def test_every_error_is_the_same_after_the_stream(kind: type[BatchgenError]) -> None:
    error = one_of(kind)
    again = from_facts(json.loads(json.dumps(to_facts(error))))
    assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)


def test_an_error_that_only_the_other_process_knows_is_the_nearest_above_it() -> None:
    facts = {**to_facts(StorageFailed("full")), "error": "Fuller"}
    facts["kinds"] = ["Fuller", *facts["kinds"]]
    assert type(from_facts(facts)) is StorageFailed


def test_what_is_not_ours_keeps_its_name() -> None:
    again = from_facts(to_facts(KeyError("width")))
    assert type(again) is BatchgenError and str(again) == "KeyError: 'width'"


def test_several_wrong_fields_are_one_error_with_a_line_each() -> None:
    first, second = SpecError("seed", -1, "0 or more"), SpecError("variants", None, "1 or more")
    both = first.beside([second], "see docs/spec.md")
    assert str(both).splitlines() == [str(first), f"  {second}", "  see docs/spec.md"]
    assert (both.field, both.given, both.allowed) == ("seed", -1, "0 or more")
    assert str(second) == "variants: got nothing; needed: 1 or more"
    assert str(pickle.loads(pickle.dumps(both))) == str(both)


@pytest.mark.parametrize("kind", [InputError, StorageFailed, UsageError])
def test_no_message_holds_a_secret(
    kind: type[BatchgenError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "of-the-environment")
    said = str(kind("cannot read https://u:hunter2@h/x?api-key=hunter2: of-the-environment"))
    assert said == "cannot read https://h/x: [secret]"


def test_values_are_shown_short() -> None:
    assert len(shown("x" * 5000)) < 130 and "5002" in shown("x" * 5000)
    assert shown({"secret": "hunter2"}) == "a mapping"
