"""The tree of errors: reject a row, retry a shard, stop the job.

    BatchgenError
    ├── RejectRow          this row cannot be made into samples; the other rows continue
    ├── RetryShard         this shard may succeed on a retry (network, a lost worker)
    │   └── OutOfMemory    a stage ran out of memory; with less at a time it may succeed
    └── StopJob            no shard can succeed until somebody acts
        ├── UsageError     found before any work: spec, input, model, changed plan   (exit 1)
        │   ├── SpecError      one field of the spec: the field, what was given, what is allowed
        │   ├── InputError     a file, a column or the complete dataset
        │   ├── DamagedRecord  a plan, marker or lease that cannot be read
        │   ├── NewerFormat    a plan, marker or lease of a later version of batchgen
        │   ├── ModelError     a model folder, component or scheduler
        │   ├── PlanChanged    the output was planned from other inputs, settings or weights
        │   └── OutputBusy     another run holds the output's lease
        ├── LimitExceeded  more failed or rejected than the policy allows          (exit 2)
        ├── Interrupted    stopped by a signal or a failing system; resumable      (exit 3)
        │   ├── StorageFailed  the store refuses: credentials, full disk, missing bucket
        │   └── DoesNotFit     a stage runs out of memory again and again
        └── VerifyFailed   storage does not hold what the plan promises            (exit 4)

Programming errors are not in the tree on purpose, and are never caught by name. Inside an actor
they fail the shard (its failed marker holds the traceback); in the driver they end the program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from batchgen.reasons import is_reason
from batchgen.secrets import redact

_LONGEST_SHOWN = 100  # characters of a wrong value in a message


class BatchgenError(Exception):
    """Base of every error that batchgen raises on purpose; its message holds no secret."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the attributes, since constructors take other arguments."""
        return _made_again, (type(self), str(self), dict(vars(self)))


class RejectRow(BatchgenError):
    """A row that cannot be made into samples.

    Args:
        reason: one of ``reasons.REASONS``, such as ``empty-prompt``; markers and reports count it.
        message: what was found and what is allowed.
    """

    def __init__(self, reason: str, message: str) -> None:
        if not is_reason(reason):
            raise AssertionError(f"{reason} is not in the list of reasons")
        super().__init__(message)
        self.reason = reason
        self.message = str(self)


class RetryShard(BatchgenError):
    """A fault that may pass: the shard is retried, at most ``policy.shard_retries`` times."""


class OutOfMemory(RetryShard):
    """A stage ran out of memory. No sample is to blame, since the size of a call is fixed.

    Args:
        stage: ``encode``, ``denoise`` or ``decode``.
        message: the library's error.
    """

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


class StopJob(BatchgenError):
    """A fault that every other shard would meet as well. ``exit_code`` is that of the program."""

    exit_code = 1


class UsageError(StopJob):
    """Something that the user must correct before work can start."""


class SpecError(UsageError):
    """One field of the spec is wrong. If several are, the attributes describe the first one.

    Args:
        field: dotted name, for example ``sampling.guidance_scale``.
        given: the value found; shown with ``repr``, None as "nothing".
        allowed: a phrase that says what would be right.
        said: replaces the value in the message, for values that must not be shown.
        because: replaces ``allowed`` in the message, where no value would be right: the reason,
            and what to do.
    """

    def __init__(
        self,
        field: str,
        given: object,
        allowed: str,
        said: str | None = None,
        because: str | None = None,
    ) -> None:
        found = f"got {shown(given)}" if said is None else said
        verb = "needed" if given is None and said is None else "allowed"
        message = f"{field}: {found}; {verb}: {allowed}"
        if because is not None:
            message = f"{field} is set to {shown(given)}, but {because}"
        super().__init__(message)
        self.field = field
        self.given = given
        self.allowed = allowed

    def beside(self, others: Sequence[SpecError], note: str = "") -> SpecError:
        """Join this error and others into one: a line for each, and the note as the last line."""
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
    """A plan, marker or lease in an output cannot be read."""


class NewerFormat(UsageError):
    """A plan, marker or lease was written by a later version of batchgen; use that version."""


class OutputBusy(UsageError):
    """Another run is working on this output."""


class LimitExceeded(StopJob):
    """More samples failed or were rejected than the policy allows."""

    exit_code = 2


class Interrupted(StopJob):
    """The run stopped before the end; committed shards stay, and ``resume`` continues."""

    exit_code = 3


class StorageFailed(Interrupted):
    """The store cannot be used: credentials, permissions, full disk, missing bucket."""


class DoesNotFit(Interrupted):
    """The devices have too little memory for a stage's calls; the message says what would fit."""


class VerifyFailed(StopJob):
    """Storage does not hold what the plan promises."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the closest known word, or an empty string."""
    close = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Format a value for a message: short, and without nested values, which may hold secrets."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple) and any(isinstance(one, list | Mapping) for one in value):
        return "a list"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = "a number with too many digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)})"


def to_facts(error: BaseException) -> dict[str, Any]:
    """Describe an error as JSON values, so that another process can raise it (``from_facts``)."""
    message = redact(str(error))
    if not isinstance(error, BatchgenError):
        message = f"{type(error).__name__}: {message}"
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BatchgenError)]
    known = {name: value for name, value in vars(error).items() if isinstance(value, str | int)}
    return {"error": type(error).__name__, "message": message, "kinds": kinds, "known": known}


def from_facts(facts: Mapping[str, Any]) -> BatchgenError:
    """Rebuild the error that ``to_facts`` described, or its nearest base class known here.

    An error that is not one of batchgen's becomes a BatchgenError.
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
    error = kind.__new__(kind, message)  # BaseException.__new__ stores the message
    vars(error).update(known)
    return error
