"""The part of the report about score sets and selections: counts, and histograms as inline SVG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchgen.errors import DamagedRecord
from batchgen.output.ledger import Ledger
from batchgen.storage.documents import Version, read_document

SUMMARY = "_batchgen/scores/summary.json"
PAGE = "_batchgen/report.html"
BEGIN, END = "<!-- scores and selections -->", "<!-- end of scores and selections -->"
BINS = 20
WIDTH, HEIGHT = 260, 72  # of a histogram, in pixels
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17a2a2")


@dataclass(frozen=True)
class Distribution:
    """How the values of a column are distributed.

    Attributes:
        column: its name.
        about: its meaning.
        low, high: the smallest and the largest value; the bins divide the range between them.
        missing: samples without a value, or whose value is not finite.
        counts: samples in each bin.
        labels: label -> the same of its samples; empty if there are many labels, or none.
    """

    column: str
    about: str
    low: float
    high: float
    missing: int
    counts: tuple[int, ...]
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SetSummary:
    """A score set: its scorers, how many shards are scored, and its distributions."""

    name: str
    scorers: str
    done: int
    shards: int
    distributions: tuple[Distribution, ...]


@dataclass(frozen=True)
class SelectionSummary:
    """A selection: its query as text, and its counts."""

    name: str
    query: str
    selected: int
    samples: int
    stale: str


@dataclass(frozen=True)
class Summary:
    """What the report says about scores and selections."""

    sets: tuple[SetSummary, ...] = ()
    selections: tuple[SelectionSummary, ...] = ()
    version: Version = 1


def read_summary(ledger: Ledger) -> Summary:
    """The stored summary; an empty one if there is none that can be read."""
    try:
        data = ledger.store.read_record(SUMMARY)
        return read_document(Summary, data, f"{ledger.store.url}/{SUMMARY}", 1, "")
    except (FileNotFoundError, DamagedRecord):
        return Summary()


def keep_summary(ledger: Ledger, summary: Summary) -> None:
    """Store the summary, and put it into the page of the report if there is one."""
    ledger.store.put(SUMMARY, (json.dumps(asdict(summary)) + "\n").encode())
    try:
        page = ledger.store.read(PAGE).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:  # a page of an older version has no place for it
        text = f"{before}{BEGIN}{section(summary)}{END}{after}"
        ledger.store.put(PAGE, text.encode())


def section(summary: Summary) -> Markup:
    """The part of the page; empty if there are neither score sets nor selections."""
    pages = Environment(
        loader=PackageLoader("batchgen", "templates"), autoescape=True, undefined=StrictUndefined
    )
    return Markup(
        pages.get_template("scores.html").render(
            sets=summary.sets,
            selections=summary.selections,
            histogram=histogram,
            colours=colours_of,
        )
    )


def histogram(one: Distribution) -> Markup:
    """A distribution as SVG: bars for all samples, and a line for each label."""
    parts = [f'<rect x="0" y="{HEIGHT}" width="{WIDTH}" height="1" fill="currentColor"/>']
    parts += _bars(one.counts)
    for colour, counts in zip(COLOURS, one.labels.values(), strict=False):
        parts.append(_line(counts, colour))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 1}" width="{WIDTH}" height="{HEIGHT + 1}" role="img">'
        f"{''.join(parts)}</svg>"
    )


def colours_of(labels: Mapping[str, object]) -> list[tuple[str, str]]:
    """Label and colour of its line."""
    return list(zip(labels, COLOURS, strict=False))


def _bars(counts: Sequence[int]) -> Iterator[str]:
    step, most = WIDTH / max(1, len(counts)), max(1, *counts, 0)
    for place, count in enumerate(counts):
        height = HEIGHT * count / most
        yield (
            f'<rect x="{place * step:.1f}" y="{HEIGHT - height:.1f}" width="{step - 1:.1f}" '
            f'height="{height:.1f}" fill="#8886"><title>{count:,}</title></rect>'
        )


def _line(counts: Sequence[int], colour: str) -> str:
    """The outline of one label's bars, on a scale of its own."""
    step, most = WIDTH / max(1, len(counts)), max(1, *counts, 0)
    points = []
    for place, count in enumerate(counts):
        y = HEIGHT - HEIGHT * count / most
        points += [f"{place * step:.1f},{y:.1f}", f"{(place + 1) * step:.1f},{y:.1f}"]
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>'
