"""Counts a job's images and shards as Ray metrics, which every node exports for dashboards."""

from __future__ import annotations

from ray.util.metrics import Counter

from batchgen.output.marker import FailedMarker, Marker


class Metrics:
    """Counts images and shards by outcome; the tag ``output`` separates the jobs of a cluster.

    Ray exports them as ``ray_batchgen_images_total`` and ``ray_batchgen_shards_total``.
    """

    def __init__(self, output: str) -> None:
        keys = ("output", "outcome")
        self._images = Counter("batchgen_images_total", "Samples that have ended", keys)
        self._shards = Counter("batchgen_shards_total", "Shards that have ended", keys)
        for counter in (self._images, self._shards):
            counter.set_default_tags({"output": output})

    def count(self, event: Marker | FailedMarker) -> None:
        if isinstance(event, FailedMarker):
            self._add(self._shards, "failed", 1)
            self._add(self._images, "failed", event.planned)
            return
        self._add(self._shards, "committed", 1)
        for outcome in ("accepted", "rejected", "failed"):
            self._add(self._images, outcome, getattr(event.counts, outcome))

    def _add(self, counter: Counter, outcome: str, count: int) -> None:
        if count:
            counter.inc(count, {"outcome": outcome})
