"""The lowest and highest value of the columns of a shard, for the dataset card."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

MOST_COLUMNS = 60
# Numbers that say nothing about how images were made.
OTHERS = frozenset({"seed", "variant", "width", "height", "key", "label", "phash"})
Ranges = Mapping[str, tuple[float, float]]


def ranges_of(table: pa.Table) -> dict[str, tuple[float, float]]:
    """Column -> lowest and highest number; columns without a finite number are left out."""
    found: dict[str, tuple[float, float]] = {}
    for field in table.schema:
        if field.name in OTHERS or not _is_number(field.type) or len(found) >= MOST_COLUMNS:
            continue
        values = pc.cast(table.column(field.name), pa.float64(), safe=False)
        ends = pc.min_max(values.filter(pc.is_finite(values)))
        low, high = ends["min"].as_py(), ends["max"].as_py()
        if low is not None:
            found[field.name] = (low, high)
    return found


def widened(known: Ranges, more: Ranges) -> dict[str, tuple[float, float]]:
    """The ranges of two shards together."""
    wide = dict(known)
    for name, (low, high) in more.items():
        before = wide.get(name, (math.inf, -math.inf))
        wide[name] = min(before[0], low), max(before[1], high)
    return wide


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
