"""What an import has read and written: counts of rows, images, objects, classes and rejects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Summary:
    """What an import has read so far, and what it wrote at the end.

    Attributes:
        images, objects: their numbers, over all rows.
        references: images of which only the path or URL is there.
        classes: the names of the classes of ``label``, else of objects; with rows of each.
        splits: rows of each split.
        reasons: rejected rows by reason; ``examples`` has a message of each.
    """

    source: str
    target: str
    kind: str = ""
    total: int | None = None
    rows: int = 0
    images: int = 0
    references: int = 0
    objects: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    rejects: str | None = None
    bytes: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    images_are: str = "bytes"
    roots: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def share_rejected(self) -> float:
        """Rejected rows as a fraction of all."""
        return self.rejected / max(1, self.rows + self.rejected)


Tell = Callable[[Summary], None]
