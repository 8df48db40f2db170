"""Shows the result of an evaluation as a Markdown text and as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from batchgen import __version__
from batchgen.report.card import cell

Facts = Mapping[str, Any]
Lines = list[tuple[str, ...]]
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 620, 300, 46, 34, 12  # of the chart, in pixels
COLOURS = {
    "real": "#777777",
    "real+geometric": "#2f6fd0",
    "real+synthetic": "#1d8a4c",
    "both+geometric": "#0f5f8a",
    "synthetic": "#b27a00",
    "real+shuffled": "#c0392b",
    "pool": "#7a4fb5",
}


def text_of(facts: Facts) -> str:
    """The page in Markdown: the primary endpoint and the verdict first."""
    parts = [f"# Evaluation {cell(facts['name'])}\n"]
    if facts["primary_endpoint"]:
        parts.append(f"{_first_upper(facts['primary_endpoint'])} (declared before the work).\n")
        parts.append(f"**{facts['verdict']}**\n")
    parts += [_section(head, table(name, facts)) for head, name in _SECTIONS if table(name, facts)]
    caveats = facts["benefit"]["caveats"] if facts["benefit"] else []
    notes = [*caveats, *facts["notes"], *facts["quality"]["notes"]]
    parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in notes))
    return "\n".join(parts)


_SECTIONS = (
    ("Accuracy on the held-out images", "cells"),
    ("Differences", "differences"),
    ("The sets", "sets"),
    ("Figures of the sets", "figures"),
    ("Figures of classes", "classes"),
    ("Images per class", "counts"),
)


def table(name: str, facts: Facts) -> Lines:
    """The lines of a table, its head first; empty if there is nothing to show."""
    lines = _TABLES[name](facts)
    return lines if len(lines) > 1 else []


def _cells(facts: Facts) -> Lines:
    benefit = facts["benefit"] or {"cells": []}
    head = ("classifier", "real per class", "learns from", "accuracy", "95 % interval")
    lines: Lines = [(*head, "as many real per class")]
    for one in benefit["cells"]:
        equivalent = ""
        if one["equivalent"] is not None:
            equivalent = f"{one['bound']} {one['equivalent']:g}".strip()
        count = str(one["per_class"]) if one["per_class"] else "-"
        low, high = one["interval"]
        shown = (_percent(one["mean"]), f"{_percent(low)} to {_percent(high)}")
        lines.append((one["classifier"], count, one["arm"], *shown, equivalent))
    return lines


def _differences(facts: Facts) -> Lines:
    benefit = facts["benefit"] or {"differences": []}
    head = ("classifier", "real per class", "arm", "against", "points", "95 % interval")
    lines: Lines = [(*head, "better / equal / worse", "p (Holm)")]
    for one in benefit["differences"]:
        low, high = one["interval"]
        counted = f"{one['wins']} / {one['ties']} / {one['losses']}"
        named = f"{one['arm']}{' (primary)' if one['is_primary'] else ''}"
        points = f"{100 * one['mean']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"
        place = one["classifier"], str(one["per_class"]), named, one["against"]
        lines.append((*place, *points, counted, f"{one['p_holm']:.3g}"))
    return lines


def _sets(facts: Facts) -> Lines:
    lines: Lines = [("set", "place", "images", "classes", "fingerprint")]
    for name, one in facts["sets"].items():
        counted = f"{one['images']:,}", f"{len(one['classes']):,}"
        lines.append((name, one["place"], *counted, one["fingerprint"][:12]))
    return lines


def _figures(facts: Facts) -> Lines:
    found = facts["quality"]
    extractor = f"{found['extractor']}, sha256 {found['extractor_fingerprint'][:12]}"
    head = ("figure", "synthetic", "95 % interval", "as many real", "better")
    lines: Lines = [(*head, "images", "extractor")]
    return lines + [(*_figure(one), extractor) for one in found["overall"]]


def _classes(facts: Facts) -> Lines:
    head = ("class", "figure", "synthetic", "95 % interval", "as many real", "better")
    lines: Lines = [(*head, "images")]
    for name, figures in facts["quality"]["classes"].items():
        lines += [(name, *_figure(one)) for one in figures]
    return lines


def _figure(one: Facts) -> tuple[str, ...]:
    spread = ""
    if one["interval"] and None not in one["interval"]:
        spread = " to ".join(_number(end) for end in one["interval"])
    elif one["deviation"] is not None:
        spread = f"± {_number(one['deviation'])} (deviation over subsets)"
    images = " / ".join(f"{count:,}" for count in one["images"] if count)
    return (
        one["name"],
        _number(one["value"]),
        spread,
        _number(one["reference"]),
        one["better"],
        images,
    )


def _counts(facts: Facts) -> Lines:
    sets = facts["sets"]
    names = sorted({name for one in sets.values() for name in one["classes"]})
    lines: Lines = [("class", *sets)]
    for name in names:
        lines.append((name, *(f"{one['classes'].get(name, 0):,}" for one in sets.values())))
    return lines


_TABLES = {
    "cells": _cells,
    "differences": _differences,
    "sets": _sets,
    "figures": _figures,
    "classes": _classes,
    "counts": _counts,
}


def _section(head: str, lines: Lines) -> str:
    rows = [f"| {' | '.join(cell(one) for one in line)} |\n" for line in lines]
    rule = f"| {' | '.join('---' for _ in lines[0])} |\n"
    return f"## {head}\n\n{rows[0]}{rule}{''.join(rows[1:])}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def page_of(facts: Facts) -> str:
    """The page in HTML, which loads nothing from elsewhere."""
    pages = Environment(
        loader=PackageLoader("batchgen", "templates"), autoescape=True, undefined=StrictUndefined
    )
    tables = [(head, table(name, facts)) for head, name in _SECTIONS]
    caveats = facts["benefit"]["caveats"] if facts["benefit"] else []
    return pages.get_template("evaluation.html").render(
        facts=facts,
        tables=[(head, lines) for head, lines in tables if lines],
        charts=charts(facts),
        notes=[*caveats, *facts["notes"], *facts["quality"]["notes"]],
        colours=COLOURS,
        arms=(facts["protocol"] or {"arms": {}})["arms"],
        size=(_WIDTH, _HEIGHT),
        version=__version__,
    )


def charts(facts: Facts) -> list[dict[str, Any]]:
    """For each classifier: points with intervals, in the pixels of a chart."""
    if not facts["benefit"]:
        return []
    found = []
    for name in dict.fromkeys(one["classifier"] for one in facts["benefit"]["cells"]):
        cells = [one for one in facts["benefit"]["cells"] if one["classifier"] == name]
        found.append({"classifier": name, **_chart(cells)})
    return found


def _chart(cells: Sequence[Facts]) -> dict[str, Any]:
    ends = [end for one in cells for end in one["interval"] if end is not None]
    low = min([*ends, *(one["mean"] for one in cells)])
    low = max(0.0, (int(20 * low) - 1) / 20)  # down to the next 5 %
    counts = sorted({one["per_class"] for one in cells if one["per_class"]})
    step = (_WIDTH - _LEFT) / len(counts)

    def height(value: float) -> float:
        share = (value - low) / (1 - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)

    arms = [arm for arm in COLOURS if any(one["arm"] == arm for one in cells)]
    points = []
    for one in cells:
        places = [counts.index(one["per_class"])] if one["per_class"] else range(len(counts))
        for place in places:
            at = (arms.index(one["arm"]) + 1) / (len(arms) + 1)
            ends = [one["mean"] if end is None else end for end in one["interval"]]
            points.append(
                {
                    "x": round(_LEFT + (place + at) * step, 1),
                    "y": height(one["mean"]),
                    "low": height(ends[0]),
                    "high": height(ends[1]),
                    "arm": one["arm"],
                    "colour": COLOURS[one["arm"]],
                    "text": f"{one['arm']}: {_percent(one['mean'])}",
                }
            )
    marks = [low + number * (1 - low) / 4 for number in range(5)]
    return {
        "points": points,
        "arms": arms,
        "lines": [(height(mark), f"{100 * mark:.0f} %") for mark in marks],
        "groups": [
            (round(_LEFT + (place + 0.5) * step, 1), f"{count} real per class")
            for place, count in enumerate(counts)
        ],
        "left": _LEFT,
        "bottom": _HEIGHT - _BOTTOM,
    }
