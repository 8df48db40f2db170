"""Sums up all markers of an output, for its dataset card and report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from batchgen.output.marker import Marker
from batchgen.output.ranges import widened

MOST_LABELS = 1000


@dataclass
class Digest:
    """Sums over all markers; ``labels`` counts images of at most MOST_LABELS different labels."""

    timings_s: Counter[str] = field(default_factory=Counter)
    measures: Counter[str] = field(default_factory=Counter)
    environments: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    retried_shards: int = 0
    bytes: int = 0
    read_bytes: int = 0

    def add(self, marker: Marker) -> None:
        for stage, seconds in marker.timings_s.items():
            self.timings_s[stage] += seconds  # type: ignore[assignment]
        self.environments[", ".join(f"{k} {v}" for k, v in marker.environment.items())] += 1
        for label, count in marker.labels.items():
            if label in self.labels or len(self.labels) < MOST_LABELS:
                self.labels[label] += count
        self.ranges = widened(self.ranges, marker.ranges)
        self.parameter_counts |= marker.parameter_counts
        for name, amount in marker.measures.items():
            self.measures[name] += amount  # type: ignore[assignment]
        self.retried_shards += marker.attempt > 1
        self.bytes += sum(file.bytes for file in marker.files)
        self.read_bytes += marker.read_bytes
