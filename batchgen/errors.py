"""The tree of errors: reject a row, retry a shard, stop the job.

    BatchgenError
    ├── RejectRow          this row cannot be made into samples; the others go on
    ├── RetryShard         this shard may succeed if tried again (network, a lost worker)
    └── StopJob            no shard can succeed until somebody acts
        ├── UsageError     wrong before any work: spec, input, model, changed plan   (exit 1)
        │   ├── SpecError      one field of the spec: the field, what was given, what is allowed
        │   ├── InputError     a file, a column or the dataset as a whole
        │   ├── DamagedRecord  a plan, marker or lease that cannot be read
        │   ├── NewerFormat    a plan, marker or lease of a later version of batchgen
        │   ├── ModelError     a model folder, component or scheduler
        │   ├── PlanChanged    the output was planned from something else
        │   └── OutputBusy     another run holds the output's lease
        ├── LimitExceeded  more failed or rejected than the policy allows          (exit 2)
        ├── Interrupted    stopped from outside or by its surroundings; resumable  (exit 3)
        │   └── StorageFailed  the store refuses: credentials, full disk, vanished bucket
        └── VerifyFailed   what is in storage does not add up                      (exit 4)

Deliberately not in the tree, and never caught by name: programming errors. Inside an actor they
fail the shard (with their traceback in its failed marker); in the driver they end the program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from batchgen.reasons import is_reason
from batchgen.secrets import redact

_LONGEST_SHOWN = 100  # characters of a value that is not as it should be


class BatchgenError(Exception):
    """Base of every error that batchgen raises on purpose; its message holds no secret."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it says and knows: constructors may want other arguments than that."""
        return _made_again, (type(self), str(self), dict(vars(self)))


class RejectRow(BatchgenError):
    """A row that cannot be made into samples.

    Args:
        reason: one of ``reasons.REASONS``, such as ``empty-prompt``.
        message: what was found and what is allowed.
    """

    def __init__(self, reason: str, message: str) -> None:
        if not is_reason(reason):
            raise AssertionError(f"{reason} is not in the list of reasons")
        super().__init__(message)
        self.reason = reason
        self.message = str(self)


class RetryShard(BatchgenError):
    """A fault that may pass: the shard is tried again, at most ``policy.shard_retries`` times."""


class StopJob(BatchgenError):
    """A fault that no other shard can escape. ``exit_code`` is the program's exit code."""

    exit_code = 1


class UsageError(StopJob):
    """Something to correct before work can start."""


class SpecError(UsageError):
    """One field of the spec is wrong, or several are, of which the first is named here.

    Args:
        field: dotted name, for example ``sampling.guidance_scale``.
        given: the value found; shown with ``repr``, None as "nothing".
        allowed: a phrase that says what would be right.
        said: in place of the value, where that must not be shown.
    """

    def __init__(self, field: str, given: object, allowed: str, said: str | None = None) -> None:
        found = f"got {shown(given)}" if said is None else said
        verb = "needed" if given is None and said is None else "allowed"
        super().__init__(f"{field}: {found}; {verb}: {allowed}")
        self.field = field
        self.given = given
        self.allowed = allowed

    def beside(self, others: Sequence[SpecError], note: str = "") -> SpecError:
        """This error and others in one, a line each, and a last line that helps with them."""
        lines = [str(self), *map(str, others), *filter(None, [note])]
        joined: SpecError = _made_again(type(self), "\n  ".join(lines), vars(self))
        return joined


class InputError(UsageError):
    """The input dataset cannot be used."""


class ModelError(UsageError):
    """The model cannot be used for this task."""


class PlanChanged(UsageError):
    """The output holds a plan made from other inputs, settings or weights."""


class DamagedRecord(UsageError):
    """A file of an output's records is not what it should be."""


class NewerFormat(UsageError):
    """A file of an output's records was written by a later version, which has to be used."""


class OutputBusy(UsageError):
    """Another run is at work on this output."""


class LimitExceeded(StopJob):
    """More samples failed or were rejected than the policy allows."""

    exit_code = 2


class Interrupted(StopJob):
    """Stopped before the end; everything committed stays, ``resume`` goes on."""

    exit_code = 3


class StorageFailed(Interrupted):
    """The store cannot be used: credentials, permissions, full disk, vanished bucket."""


class VerifyFailed(StopJob):
    """Storage does not hold what the plan promises."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """A value in a message: short, and without what may lie deep in it."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple) and any(isinstance(one, list | Mapping) for one in value):
        return "a list"
    try:
        text = repr(value)
    except ValueError:  # a number beyond what Python writes in figures
        text = "a number of too many digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)})"


def to_facts(error: BaseException) -> dict[str, Any]:
    """What another process needs to raise the same error, as JSON; see ``from_facts``."""
    message = redact(str(error))
    if not isinstance(error, BatchgenError):
        message = f"{type(error).__name__}: {message}"
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BatchgenError)]
    known = {name: value for name, value in vars(error).items() if isinstance(value, str | int)}
    return {"error": type(error).__name__, "message": message, "kinds": kinds, "known": known}


def from_facts(facts: Mapping[str, Any]) -> BatchgenError:
    """The error that ``to_facts`` told of, or the nearest class above it that this process has.

    What was none of batchgen's is a BatchgenError here.
    """
    classes = {kind.__name__: kind for kind in _classes(BatchgenError)}
    kind = next((classes[name] for name in facts["kinds"] if name in classes), BatchgenError)
    known = facts["known"] if kind.__name__ == facts["error"] else {}
    made: BatchgenError = _made_again(kind, facts["message"], known)
    return made


def _classes(kind: type[BatchgenError]) -> Iterator[type[BatchgenError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _classes(below)


def _made_again(kind: type[BatchgenError], message: str, known: Mapping[str, Any]) -> Any:
    error = kind.__new__(kind, message)  # which gives it its text
    vars(error).update(known)
    return error
