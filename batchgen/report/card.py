"""Writes the dataset card, README.md, in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from batchgen import __version__
from batchgen.output.formats import format_of, kept_columns, own_columns
from batchgen.output.ledger import Ledger
from batchgen.output.outcome import Reason
from batchgen.output.quota_record import QuotaRecord
from batchgen.output.tally import Tally
from batchgen.plain_text import plain, short
from batchgen.plan.parts import Planned
from batchgen.plan.plan import Plan
from batchgen.plan.scores import score_columns
from batchgen.report.card_sections import (
    Rows,
    evaluations,
    filters,
    licences,
    limits,
    scorers,
    selections,
    varying,
)
from batchgen.report.digest import Digest
from batchgen.report.settings import applying, approximations, model_name
from batchgen.spec.call_settings import CALL_SETTINGS
from batchgen.spec.spec import Spec

SHOWN_LABELS = 50
SHOWN_COLUMNS = 100
_LONGEST_CELL = 400

# Task -> the Hub's categories of datasets.
CATEGORIES = {
    "unconditional": ("unconditional-image-generation",),
    "class-conditional": ("unconditional-image-generation", "image-classification"),
    "text-to-image": ("text-to-image",),
    "image-to-image": ("image-to-image",),
    "inpainting": ("image-to-image",),
    "super-resolution": ("image-to-image",),
    "image-edit": ("image-to-image",),
    "control": ("text-to-image", "image-to-image"),
    "variation": ("image-to-image",),
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))
_MEANINGS = {
    "key": "unique name of the image",
    "image": "the encoded image",
    "prompt": "the prompt",
    "negative_prompt": "the negative prompt",
    "label": "the label, copied from the input",
    "seed": "the seed of this image",
    "variant": "number of the image among those of its row",
    "source_id": "file and row of the input",
    "task": "the task of the model",
    "model_id": "the model",
    "model_revision": "the model's commit, or the beginning of its weights' SHA-256",
    "scheduler": "the scheduler (sampler)",
    "sha256": "SHA-256 of the image's stored bytes",
    "prompt_truncated": "true if the prompt was too long for the text encoder and was truncated",
    "class_label": "number of the class in the model",
    "lora": "LoRA adapters and their weights",
    "conditioning": "how conditioning images were prepared",
    "unsigned_sha256": "SHA-256 of the image before it was signed",
    "approximate": "how sampling was made faster; the images are not the exact ones",
    **{name: one.about for name, one in CALL_SETTINGS.items()},
}


WHY = {
    "": "the first run",
    "variants": "further variants of the rows",
    "limit": "further rows of the input",
    "input": "rows of another input",
    "again": "samples that were rejected or failed, with new seeds",
    "remake": "rejected samples, with new seeds",
    "quota": "candidates for groups that lacked accepted samples",
}


def card_of(
    plan: Planned,
    tally: Tally,
    digest: Digest,
    reasons: Iterable[Reason],
    sheet: str | None,
    names: Sequence[str] = (),
    quota: QuotaRecord | None = None,
    ledger: Ledger | None = None,
) -> str:
    """The text of the card, Markdown with a YAML head.

    Args:
        plan: that of the output, or its parts.
        tally, digest, reasons: sums over its markers.
        sheet: relative path from the card to the contact sheet; None if there are no images.
        names: those of the labels, if the input declares them and the data files do not.
        quota: how far the quota is met, as it is recorded; None without one.
        ledger: of the output, whose selections and evaluations are listed.
    """
    first = plan.plans[0]
    spec, form = first.spec, format_of(first)
    front = {
        "license": spec.output.license,
        "task_categories": [*CATEGORIES[spec.task], *_of_labels(spec)],
        "size_categories": [_size(tally.accepted)],
        "tags": ["synthetic", "batchgen"],
        "configs": [{"config_name": "default", "data_files": form.data_files()}],
    }
    picture = f"![Some of the images, with their prompts]({sheet})\n\n" if sheet else ""
    counts = [("planned samples", tally.samples), ("accepted", tally.accepted)]
    counts += [("rejected", tally.rejected), ("failed", tally.failed)]
    counts += [(f"dropped: {one.reason}", one.count) for one in reasons]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        "\n# Synthetic images\n",
        f"{picture}Generated with batchgen {__version__} by a diffusion model: these images are "
        "synthetic, not photographs or records of anything.\n",
        _table(("", "samples"), counts),
        "## How they were generated\n",
        _table(("", ""), [(name, str(value)) for name, value in _facts(first)]),
        *_section("Values that vary", ("column", "lowest", "highest"), varying(digest.ranges)),
        *_parts(plan.plans),
        *_quota(quota),
        *_labels(digest.labels, tally.accepted),
        *_categories(spec.labels.names),
        *_chosen(first, ledger),
        "## Columns\n",
        _columns(first),
        f"## How to load them\n\nIn the folder of this dataset:\n\n```python\n"
        f"{form.how_to_load(spec, names)}\n```\n\nFrom the Hugging Face Hub, `folder` is "
        "`hf://datasets/` and the dataset's name.\n",
        *_limits(first, tally, ledger),
        "## Other files\n\n`_batchgen/plan.json` records the plan and its inputs, "
        "`_batchgen/shards/` the result of\neach shard, `_batchgen/rejects/` which samples are "
        "missing and why. `batchgen verify` proves the counts.\nA copy on the Hub that "
        "`batchgen push` made does not have these files.\n",
    ]
    return "\n".join(parts)


def _section(head: str, columns: tuple[str, ...], rows: Rows) -> list[str]:
    """A section with a table; nothing without rows."""
    return [f"## {head}\n", _table(columns, rows)] if rows else []


def _chosen(plan: Plan, ledger: Ledger | None) -> list[str]:
    """How images were judged and chosen: scorers, filters, selections, evaluations."""
    parts = _section("Scorers", ("scorer", "model", "fingerprint"), scorers(plan))
    parts += _section("Filters that reject", ("reason", "setting"), filters(plan))
    if ledger is not None:
        head = ("selection", "condition", "of samples", "images")
        parts += _section("Selections", head, selections(ledger))
        parts += _section("Evaluations", ("evaluation", "verdict"), evaluations(ledger))
    return parts


def _limits(plan: Plan, tally: Tally, ledger: Ledger | None) -> list[str]:
    if ledger is None:
        return []
    lines = "".join(f"- {one}\n" for one in limits(plan, tally, ledger))
    return [f"## Known limits\n\n{lines}"]


def _of_labels(spec: Spec) -> Iterator[str]:
    """The Hub's categories of datasets with labels of pixels."""
    if spec.input.columns.objects is not None:
        yield "object-detection"
    if spec.input.columns.label_mask is not None:
        yield "image-segmentation"


def _size(images: int) -> str:
    """The Hub's size category for this number of images."""
    larger = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
    return next((name for limit, name in (*_SIZES, *larger) if images < limit), "1B<n<10B")


def _facts(plan: Plan) -> list[tuple[str, object]]:
    spec = plan.spec
    return [
        ("task", spec.task),
        ("model", model_name(plan.model.model_id)),
        ("revision", plan.model.revision),
        ("scheduler", plan.model.scheduler),
        *((name.replace("_", " "), value) for name, value in applying(plan).items()),
        *approximations(spec).items(),
        ("dtype", spec.model.dtype),
        *((str(name), value) for name, value in licences(plan)),
        ("images per row", spec.variants),
        ("run seed", spec.seed),
    ]


def _parts(plans: Sequence[Plan]) -> list[str]:
    """A table of the parts, if the output was extended."""
    if not plans[1:]:
        return []
    rows: list[tuple[object, ...]] = [
        (plan.place.part, WHY[plan.place.why], plan.samples, plan.numbers.start) for plan in plans
    ]
    return ["## Parts\n", _table(("part", "what it adds", "samples", "first shard"), rows)]


def _quota(quota: QuotaRecord | None) -> list[str]:
    """A table of the groups of a quota."""
    if quota is None:
        return []
    head = ("group", "wanted", "accepted", "candidates", "accept rate", "95 % interval")
    rows: list[tuple[object, ...]] = [
        (
            *(one.name, one.wanted, one.accepted, one.candidates),
            f"{one.rate:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
        )
        for one in quota.groups[:SHOWN_LABELS]
    ]
    per = f" per {', '.join(quota.per)}" if quota.per else ""
    where = f" where {quota.where}" if quota.where else ""
    told = f"Accepted samples{per}{where}; the selection quota has the wanted number of them."
    lacking = f" {quota.why}." if quota.lacking else ""
    return [f"## Quota\n\n{html.escape(plain(told + lacking))}\n", _table(head, rows)]


def _labels(labels: Counter[str], accepted: int) -> list[str]:
    if not labels:
        return []
    shown = labels.most_common(SHOWN_LABELS)
    others = accepted - sum(count for _, count in shown)
    rows: list[tuple[str, object]] = [
        *shown,
        *([("other or no label", others)] if others > 0 else []),
    ]
    return ["## Labels\n", _table(("label", "images"), rows)]


def _categories(names: Sequence[str] | None) -> list[str]:
    if not names:
        return []
    rows: list[tuple[object, ...]] = [*enumerate(names[:SHOWN_LABELS])]
    more = len(names) - SHOWN_LABELS
    rows += [("...", f"{more} more")] if more > 0 else []
    return ["## Categories of objects\n", _table(("number", "name"), rows)]


def _columns(plan: Plan) -> str:
    names = [name for name, _ in plan.columns]
    kept = kept_columns(plan.spec, names, plan.model.settings)
    own = own_columns(plan.spec, plan.model.settings)
    types = dict(plan.columns)
    scores = score_columns(plan.spec)
    meanings = _MEANINGS | {column.name: column.about for column in scores}
    rows = [(one.name, _kind(one, plan, types), meanings.get(one.name, "")) for one in own]
    rows += [(output, types[name], "copied from the input") for name, output in kept.items()]
    more = len(rows) - SHOWN_COLUMNS
    table = _table(("column", "type", ""), rows[:SHOWN_COLUMNS])
    return f"{table}\nand {more} more columns, copied from the input.\n" if more > 0 else table


def _kind(column: Any, plan: Plan, types: dict[str, str]) -> str:
    label = plan.spec.input.columns.label
    if column.name == "image":
        return "image"
    return types.get(label or "", "string") if column.name == "label" else str(column.type)


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, *((cell(value) for value in row) for row in rows)]
    text = [f"| {' | '.join(line)} |\n" for line in lines]
    numbers = head[-1] in ("samples", "images")
    rule = ["---"] * (len(head) - 1) + ["---:" if numbers else "---"]
    return "".join([text[0], f"| {' | '.join(rule)} |\n", *text[1:]])


def cell(value: object) -> str:
    """A value as the text of a table's cell, with Markdown and HTML escaped."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    shown = html.escape(short(plain(str(value)), _LONGEST_CELL), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", shown)
