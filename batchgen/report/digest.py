"""Sums up all markers of an output, for its dataset card and report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from batchgen.output.ledger import Ledger

MOST_LABELS = 1000


@dataclass
class Digest:
    """Sums over all markers; ``labels`` counts images of at most MOST_LABELS different labels."""

    timings_s: Counter[str] = field(default_factory=Counter)
    environments: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    retried_shards: int = 0
    bytes: int = 0
    read_bytes: int = 0


def digest_of(ledger: Ledger, committed: frozenset[int]) -> Digest:
    digest = Digest()
    for marker in ledger.markers(committed):
        for stage, seconds in marker.timings_s.items():
            digest.timings_s[stage] += seconds  # type: ignore[assignment]
        digest.environments[", ".join(f"{k} {v}" for k, v in marker.environment.items())] += 1
        for label, count in marker.labels.items():
            if label in digest.labels or len(digest.labels) < MOST_LABELS:
                digest.labels[label] += count
        digest.parameter_counts |= marker.parameter_counts
        digest.retried_shards += marker.attempt > 1
        digest.bytes += sum(file.bytes for file in marker.files)
        digest.read_bytes += marker.read_bytes
    return digest
