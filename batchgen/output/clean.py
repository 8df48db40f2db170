"""Removes what dead runs have left in an output: unfinished uploads and temporary files."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger
from batchgen.storage import TEMPORARY, abort, unfinished_uploads


@dataclass(frozen=True)
class Cleaned:
    """What was, or with ``dry_run`` would be, removed."""

    uploads: tuple[str, ...]
    temporary_files: tuple[str, ...]


def clean(ledger: Ledger, dry_run: bool = False) -> Cleaned:
    """Abort unfinished uploads below the output's own folders and remove its temporary files.

    It holds the output's lease meanwhile, so that no living run loses what it is writing.

    Raises:
        InputError: nothing was run into it.
        OutputBusy: a run is at work on it.
    """
    ledger.require_plan()
    if dry_run:
        return _left(ledger)
    with hold_lease(ledger.store, lambda reason: None) as lease:
        left = _left(ledger)
        for upload in unfinished_uploads(ledger.store):
            abort(ledger.store, upload)
        ledger.store.clear_temporary(older_than_s=0)
        lease.ending = "what dead runs had left was removed"
    return left


def _left(ledger: Ledger) -> Cleaned:
    uploads = tuple(upload.name for upload in unfinished_uploads(ledger.store))
    temporary = ledger.store.list(TEMPORARY) if ledger.store.local else {}
    return Cleaned(uploads, tuple(sorted(temporary)))
