"""The record of a quota in its output: what each group has, wants and took."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from batchgen.errors import DamagedRecord, LimitExceeded
from batchgen.output.ledger import Ledger
from batchgen.plan.parts import Parts
from batchgen.spec.quota_section import Quota
from batchgen.storage.documents import Count, Number, Version, read_document

QUOTA = "_batchgen/quota.json"
VERSION = 1


@dataclass(frozen=True)
class GroupCount:
    """One group of a quota.

    Attributes:
        name: its values.
        wanted: the number of accepted samples that it should have.
        accepted: samples that count; they may be more than wanted.
        candidates: samples that were generated for it.
        low, high: 95 % interval of the accept rate (Wilson).
    """

    name: str
    wanted: Count
    accepted: Count
    candidates: Count
    low: Number
    high: Number

    @property
    def rate(self) -> float:
        return self.accepted / self.candidates if self.candidates else 0.0

    @property
    def kept(self) -> int:
        """Those that the selection has."""
        return min(self.accepted, self.wanted)

    @property
    def lacking(self) -> int:
        return max(0, self.wanted - self.accepted)

    @property
    def text(self) -> str:
        """One line for people, with a forecast if samples are lacking."""
        told = (
            f"{self.name}: {self.accepted:,} of {self.wanted:,} accepted, {self.candidates:,} "
            f"candidates, accept rate {self.rate:.2f} ({self.low:.2f} to {self.high:.2f})"
        )
        if not self.lacking:
            return told
        least = math.ceil(self.lacking / self.high) if self.high > 0 else 0
        most = f"{math.ceil(self.lacking / self.low):,}" if self.low > 0.001 else "any number"
        return f"{told}; about {least:,} to {most} more candidates"


@dataclass(frozen=True)
class QuotaRecord:
    """How far a quota is met, after the last round.

    Attributes:
        per: the columns that make a group.
        where: the condition that counted samples meet.
        rounds: the number of rounds, with the first.
        why: why no round follows although groups lack samples; empty if all are full.
        groups: all of them.
        asked: the quota, as ``asked_for`` writes it; empty in the records of older versions.
        parts: the number of the output's parts; 0 in the records of older versions.
    """

    per: tuple[str, ...]
    where: str
    rounds: Count
    why: str
    groups: tuple[GroupCount, ...]
    asked: str = ""
    parts: Count = 0
    version: Version = VERSION

    @property
    def lacking(self) -> tuple[GroupCount, ...]:
        """The groups that lack samples, the neediest first."""
        found = (one for one in self.groups if one.lacking)
        return tuple(sorted(found, key=lambda one: (-one.lacking, one.name)))

    def is_of(self, parts: Parts) -> bool:
        """Whether it is about the quota that these parts have in force, and about all of them."""
        quota = parts.spec.quota
        if not self.asked:
            return quota is not None
        return quota is not None and (self.asked, self.parts) == (asked_for(quota), len(parts))

    @property
    def message(self) -> str:
        """The result in one line."""
        groups = sum(one.wanted > 0 for one in self.groups)
        kept = sum(one.kept for one in self.groups)
        candidates = sum(one.candidates for one in self.groups)
        told = (
            f"quota: {groups - len(self.lacking):,} of {groups:,} groups are full; {kept:,} "
            f"samples in the selection 'quota', of {candidates:,} candidates in {self.rounds:,} "
            f"round{'' if self.rounds == 1 else 's'}"
        )
        return f"{told}. {self.why}: {'; '.join(self.lines(3))}" if self.lacking else told

    def ending(self, failed: int) -> tuple[int, str]:
        """The exit code and message of an output that has all of its samples.

        Samples that failed do not count against it if others took their places, so that all groups
        are full.
        """
        told = f"{self.message}; {failed:,} samples failed" if failed else self.message
        if self.lacking:
            return LimitExceeded.exit_code, told
        return 0, f"{told}, and others took their places" if failed else told

    def lines(self, shown: int = 8) -> Iterator[str]:
        """The groups that lack samples, one line each."""
        yield from (one.text for one in self.lacking[:shown])
        if self.lacking[shown:]:
            yield f"and {len(self.lacking) - shown:,} more groups lack samples"


def asked_for(quota: Quota) -> str:
    """A quota as one line; two that ask for the same have the same."""
    return json.dumps(quota.model_dump(mode="json", exclude_defaults=True), sort_keys=True)


def keep_quota(ledger: Ledger, record: QuotaRecord) -> None:
    """Write the record; it replaces that of an earlier run."""
    ledger.store.put(QUOTA, (json.dumps(asdict(record), indent=1) + "\n").encode())


def quota_of(ledger: Ledger) -> QuotaRecord | None:
    """The record of an output; None if it has none that can be read."""
    place = f"{ledger.store.url}/{QUOTA}"
    try:
        data = ledger.store.read_record(QUOTA)
        return read_document(QuotaRecord, data, place, VERSION, "run the job again")
    except (FileNotFoundError, DamagedRecord):
        return None
