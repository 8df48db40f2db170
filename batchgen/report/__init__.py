"""Writes the dataset card, the HTML report and the contact sheet of an output."""

from __future__ import annotations

import posixpath
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchgen import __version__
from batchgen.errors import LimitExceeded, VerifyFailed
from batchgen.images.files import contact_sheet
from batchgen.output.formats import SCHEMAS, label_names
from batchgen.output.holdings import CARD, CARD_MARK, card_is_ours
from batchgen.output.ledger import RECORDS, Ledger, States
from batchgen.output.outcome import reasons_of, survey
from batchgen.output.quota_record import quota_of
from batchgen.output.tally import Tally
from batchgen.output.verify import damaged
from batchgen.plan.parts import Planned
from batchgen.report.card import card_of
from batchgen.report.digest import Digest
from batchgen.report.gallery import shown_of
from batchgen.report.scores import BEGIN, END, PAGE, read_summary, section
from batchgen.report.settings import differing, model_name

__all__ = ["OTHER_CARD", "PAGE", "SHEET", "refresh_card", "write"]

OTHER_CARD = "_batchgen/README.md"  # used if README.md is a file of the user
SHEET = "_batchgen/contact-sheet.png"
SHOWN_FAILURES = 20
# Name of a stage in a marker's timings -> its name in the report.
STAGES = {
    "prepare": "preparing rows",
    "wait": "waiting for the device",
    "encode": "encoding prompts and images",
    "denoise": "denoising",
    "decode": "decoding latents to pixels",
    "score": "scoring images",
    "image_wait": "waiting for image files to be encoded",
    "table": "building the columns of the data files",
    "write": "writing files to storage",
}


# Measure of a marker -> what its sum over all shards is.
MEASURES = {
    "padding": "samples generated and thrown away, to fill micro-batches",
}


def write(
    plan: Planned,
    ledger: Ledger,
    states: States,
    tally: Tally,
    digest: Digest,
    exit_code: int,
    message: str,
) -> tuple[int, str]:
    """Write the card, the page and the contact sheet of an output; replaces those of earlier runs.

    Args:
        plan, ledger: those of the output; its plan may have several parts.
        states: the states of its shards.
        tally, digest: sums over all of its markers.
        exit_code, message: the verdict on the output.

    Returns:
        The exit code and the message; they differ from those given if images are damaged.
    """
    reasons = reasons_of(tally)
    unreadable: list[str] = []
    shown = list(shown_of(plan, ledger, sorted(states.committed), unreadable))
    if unreadable:
        exit_code, message = damaged(ledger.store.url, unreadable)
    pages = Environment(
        loader=PackageLoader("batchgen", "templates"), autoescape=True, undefined=StrictUndefined
    )
    changed, others = differing(plan.spec)
    facts: dict[str, Any] = {
        "plan": plan,
        "spec": plan.spec,
        "model": model_name(plan.plans[0].model.model_id),
        "tally": tally,
        "digest": digest,
        "failures": ledger.failures(sorted(states.failed)[:SHOWN_FAILURES]),
        "reasons": reasons,
        "shown": shown,
        "state": _state(tally, exit_code),
        "message": message,
        "stages": STAGES,
        "measures": MEASURES,
        "version": __version__,
        "scores": Markup(f"{BEGIN}{section(read_summary(ledger))}{END}"),
        "changed": changed,
        "others": others,
        "quota": quota_of(ledger),
    }
    if shown:
        sheet = contact_sheet(
            [one.plain for one in shown],
            [one.prompt for one in shown],
            [one.marks for one in shown],
        )
        ledger.store.put(SHEET, sheet)
    place = _write_card(plan, ledger, tally, digest, bool(shown))
    if place != CARD:
        message += f"; {CARD} is not batchgen's and was kept: the dataset card is {OTHER_CARD}"
    ledger.store.put(PAGE, pages.get_template("report.html").render(facts).encode())
    return exit_code, message


def _write_card(
    plan: Planned, ledger: Ledger, tally: Tally, digest: Digest, has_sheet: bool
) -> str:
    """Write the dataset card; returns its name."""
    place = CARD if card_is_ours(ledger.store) else OTHER_CARD
    sheet = posixpath.relpath(SHEET, posixpath.dirname(place) or ".") if has_sheet else None
    names = _label_names(ledger)
    card = card_of(plan, tally, digest, reasons_of(tally), sheet, names, quota_of(ledger), ledger)
    card += CARD_MARK
    ledger.store.put(place, card.encode())
    return place


def refresh_card(ledger: Ledger) -> None:
    """Write the card of an output once more, with the selections and evaluations that it has now.

    An output without a card has not ended a run yet; it gets its card then.
    """
    there = ledger.store.list("")
    records = ledger.store.list(RECORDS)
    if CARD not in there and OTHER_CARD.rpartition("/")[2] not in records:
        return
    plan, digest = ledger.parts(), Digest()
    tally, _, _ = survey(plan, ledger, ledger.states(plan), digest.add)
    _write_card(plan, ledger, tally, digest, SHEET.rpartition("/")[2] in records)


def _label_names(ledger: Ledger) -> list[str]:
    """The names of the labels, from the schema file of formats whose data files have no types."""
    for name in sorted(ledger.store.list(SCHEMAS)):
        try:
            return label_names(
                pa.ipc.read_schema(pa.py_buffer(ledger.store.read(f"{SCHEMAS}/{name}")))
            )
        except (pa.ArrowException, OSError):
            continue  # `verify` reports it
    return []


def _state(tally: Tally, exit_code: int) -> str:
    """The first words of the page; the message follows."""
    if exit_code == 0:
        return "Complete."
    if exit_code == VerifyFailed.exit_code:
        return "Damaged."
    if tally.committed == tally.shards:
        return "Complete, but"
    pending = tally.shards - tally.committed - tally.failed_shards
    return "Stopped." if exit_code == LimitExceeded.exit_code and pending else "Not complete."
