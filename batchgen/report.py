"""What a person looks at afterwards: the dataset card, the report page and a contact sheet."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from batchgen import __version__
from batchgen.errors import BatchgenError, LimitExceeded, VerifyFailed
from batchgen.holdings import CARD, CARD_MARK, card_is_ours
from batchgen.images import contact_sheet, thumbnail
from batchgen.ledger import DATA, Ledger
from batchgen.plan import Plan
from batchgen.progress import Tally
from batchgen.verify import damaged
from batchgen.writer import format_of

OTHER_CARD = "_batchgen/README.md"  # where the output has a README.md of its own
PAGE = "_batchgen/report.html"
SHEET = "_batchgen/contact-sheet.png"
SHOWN_IMAGES = 64
SHOWN_SHARDS = 8
SHOWN_FAILURES = 20
THUMBNAIL_PX = 128
_UNREADABLE = (BatchgenError, OSError, ValueError, KeyError, TypeError, pa.ArrowException)


@dataclass(frozen=True)
class Shown:
    """One image on the page."""

    key: str
    prompt: str
    data: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.data).decode()


@dataclass
class Digest:
    """Sums over all markers."""

    timings_s: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    environments: Counter[str] = field(default_factory=Counter)
    parameter_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    truncated_prompts: int = 0
    retried_shards: int = 0
    bytes: int = 0
    read_bytes: int = 0


def write(
    plan: Plan, ledger: Ledger, tally: Tally, exit_code: int, message: str
) -> tuple[int, str]:
    """Put the card, the page and the sheet of an output; they replace what an earlier run put.

    Returns:
        The exit code and the message; others than those given if images proved damaged.
    """
    states = ledger.states(plan)
    digest = digest_of(ledger, states.committed)
    failures = ledger.failures(sorted(states.failed)[:SHOWN_FAILURES])
    unreadable: list[str] = []
    shown = list(_shown(plan, ledger, sorted(states.committed), unreadable))
    if unreadable:
        exit_code, message = damaged(ledger.store.url, unreadable)
    pages = Environment(
        loader=PackageLoader("batchgen", "templates"), autoescape=True, undefined=StrictUndefined
    )
    facts: dict[str, Any] = {
        "plan": plan,
        "spec": plan.spec,
        "tally": tally,
        "digest": digest,
        "failures": failures,
        "shown": shown,
        "state": _state(tally, exit_code),
        "message": message,
        "version": __version__,
        "settings": sorted(plan.spec.result_fields().items()),
    }
    card = _card(plan, tally, digest) + CARD_MARK
    if card_is_ours(ledger.store):
        ledger.store.put(CARD, card.encode())
    else:
        ledger.store.put(OTHER_CARD, card.encode())
        message += f"; {CARD} there is not batchgen's and stays: the card is {OTHER_CARD}"
    ledger.store.put(PAGE, pages.get_template("report.html").render(facts).encode())
    if shown:
        sheet = contact_sheet([one.data for one in shown], [one.prompt for one in shown])
        ledger.store.put(SHEET, sheet)
    return exit_code, message


def _state(tally: Tally, exit_code: int) -> str:
    """How the page begins; its message follows."""
    if exit_code == 0:
        return "Complete."
    if exit_code == VerifyFailed.exit_code:
        return "Damaged."
    if tally.committed == tally.shards:
        return "Complete, but"
    pending = tally.shards - tally.committed - tally.failed_shards
    return "Stopped." if exit_code == LimitExceeded.exit_code and pending else "Not complete."


def digest_of(ledger: Ledger, committed: frozenset[int]) -> Digest:
    digest = Digest()
    for marker in ledger.markers(committed):
        for stage, seconds in marker.timings_s.items():
            digest.timings_s[stage] += seconds  # type: ignore[assignment]
        digest.reasons.update(marker.reasons)
        digest.environments[", ".join(f"{k} {v}" for k, v in marker.environment.items())] += 1
        digest.parameter_counts |= marker.parameter_counts
        digest.truncated_prompts += marker.truncated_prompts
        digest.retried_shards += marker.attempt > 1
        digest.bytes += sum(file.bytes for file in marker.files)
        digest.read_bytes += marker.read_bytes
    return digest


def _shown(
    plan: Plan, ledger: Ledger, committed: list[int], unreadable: list[str]
) -> Iterator[Shown]:
    """Images from shards spread over the output, read no further than needed.

    A shard whose images cannot be read or decoded shows none; its data files are added to
    ``unreadable``.
    """
    if not committed:
        return
    step = max(1, len(committed) // SHOWN_SHARDS)
    shards = committed[::step][:SHOWN_SHARDS]
    per_shard = -(-SHOWN_IMAGES // len(shards))
    for marker in ledger.markers(shards):
        names = [file.name for file in marker.files if file.name.startswith(f"{DATA}/")]
        damaged_name = names[0] if names else ""
        try:
            for row in format_of(plan).peek(ledger.store, names, per_shard):
                damaged_name = next((name for name in names if row["key"] in name), names[0])
                yield _thumb(row)
        except _UNREADABLE:
            unreadable.append(damaged_name)


def _thumb(row: dict[str, Any]) -> Shown:
    label = row["label"]
    caption = row["prompt"] or ("" if label is None else str(label))
    return Shown(row["key"], caption, thumbnail(row["image"], THUMBNAIL_PX))


def _card(plan: Plan, tally: Tally, digest: Digest) -> str:
    spec, form = plan.spec, format_of(plan)
    front = {
        "license": spec.output.license,
        "task_categories": [spec.task],
        "tags": ["synthetic", "batchgen"],
        "configs": [{"config_name": "default", "data_files": form.data_files()}],
    }
    reasons = "".join(f"| rejected: {name} | {count} |\n" for name, count in digest.reasons.items())
    settings = json.dumps(spec.sampling.model_dump(), indent=1)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Synthetic images made with batchgen {__version__}

| | |
| --- | ---: |
| planned samples | {plan.samples} |
| accepted | {tally.accepted} |
| rejected | {tally.rejected} |
| failed | {tally.failed} |
{reasons}
Task `{spec.task}`, model `{plan.model.model_id}` (revision `{plan.model.revision}`), scheduler
`{plan.model.scheduler}`, {spec.variants} variants a row, run seed {spec.seed}. These images were
made by a generative model; they are not photographs or records of anything.

```json
{settings}
```

Load it:

```python
{form.how_to_load(spec)}
```

`_batchgen/plan.json` says what was planned and from what, `_batchgen/shards/` what became of each
shard, `_batchgen/rejects/` which samples are not here and why. `batchgen verify` proves the counts.
"""
