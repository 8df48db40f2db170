"""Splits of a source by the names of its folders and files: train, validation, test."""

from __future__ import annotations

import re
from collections.abc import Iterable

from batchgen.spec.splits import SPLITS, split_named

_PARTS = re.compile(r"[^a-z]+")


def split_in(name: str) -> str | None:
    """The split in the name of a file, such as ``data/train-00000-of-00001`` or ``val2017``."""
    for part in reversed(name.split("/")):
        found = {SPLITS[word] for word in _PARTS.split(part.lower()) if word in SPLITS}
        if len(found) == 1:
            return found.pop()
    return None


def by_first_folder(names: Iterable[str]) -> bool:
    """Whether the first folders of all files are splits; files in no folder do not count."""
    firsts = {name.partition("/")[0] for name in names if "/" in name}
    return bool(firsts) and all(split_named(one) is not None for one in firsts)
