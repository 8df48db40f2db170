"""The markers of shards: the record that a shard is committed, and the record of its failure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from batchgen.plan.plan import Plan
from batchgen.storage.documents import Count, Number, Time, Version, read_document

MARKER_VERSION = 1


@dataclass(frozen=True)
class Written:
    """One committed file: its name in the output, size in bytes, SHA-256 and number of rows."""

    name: str
    bytes: Count
    sha256: str
    rows: Count


@dataclass(frozen=True)
class Counts:
    """How the planned samples of a shard ended: ``planned = accepted + rejected + failed``."""

    planned: Count
    accepted: Count
    rejected: Count
    failed: Count

    def add_up(self) -> bool:
        return self.planned == self.accepted + self.rejected + self.failed


@dataclass(frozen=True)
class Example:
    """One of the samples (or shards) that were dropped for a reason, with its message."""

    key: str
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The object whose existence makes a shard committed; written after all files that it names.

    ``plan_fingerprint`` is that of the shard's plan; in a score set, ``spec_fingerprint`` is that
    of the set. ``examples`` has the first sample of each reason, ``labels`` counts the accepted
    samples of the most frequent labels. Markers of older versions lack these three, and
    ``decode_batch_size`` (samples in each call of the decoder).
    """

    shard: Count
    counts: Counts
    files: tuple[Written, ...]
    spec_fingerprint: str
    plan_fingerprint: str | None = None
    reasons: dict[str, Count] = field(default_factory=dict)
    truncated_prompts: Count = 0
    timings_s: dict[str, Number] = field(default_factory=dict)
    read_bytes: Count = 0
    batch_size: Count = 0
    decode_batch_size: Count = 0
    micro_batches: Count = 0
    parameter_counts: dict[str, dict[str, Count]] = field(default_factory=dict)
    measures: dict[str, Number] = field(default_factory=dict)
    attempt: Count = 1
    examples: dict[str, Example] = field(default_factory=dict)
    labels: dict[str, Count] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    finished_at: Time = 0.0
    version: Version = MARKER_VERSION

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def is_of(self, plan: Plan) -> bool:
        """Whether it belongs to this plan; an old marker has only the spec's fingerprint."""
        same_spec = self.spec_fingerprint == plan.fingerprints.spec
        return same_spec and self.plan_fingerprint in (None, plan.fingerprint)

    def shares_plan(self, other: Marker) -> bool:
        """Whether both belong to the same plan, as far as their fingerprints say."""
        if self.spec_fingerprint != other.spec_fingerprint:
            return False
        known = {self.plan_fingerprint, other.plan_fingerprint} - {None}
        return len(known) < 2


@dataclass(frozen=True)
class FailedMarker:
    """The record of a failed shard: its error. A later commit of the shard removes it."""

    shard: Count
    planned: Count = 0
    error: str = ""
    message: str = ""
    traceback: str = ""
    attempts: Count = 1
    host: str = ""
    failed_at: Time = 0.0
    version: Version = MARKER_VERSION

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def parse_marker(data: bytes, place: str = "the marker", remedy: str = "") -> Marker:
    """A marker from its JSON; ``place`` is its location, for messages.

    Raises:
        NewerFormat: a later version wrote it.
        DamagedRecord: it is not a marker.
    """
    return read_document(Marker, data, place, MARKER_VERSION, remedy)


def parse_failed(data: bytes, place: str = "the failed marker", remedy: str = "") -> FailedMarker:
    """A failed marker from its JSON; raises as ``parse_marker``."""
    return read_document(FailedMarker, data, place, MARKER_VERSION, remedy)
