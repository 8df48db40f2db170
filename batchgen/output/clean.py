"""Removes unfinished uploads and temporary files that crashed runs left in an output."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.output.lease import hold_lease
from batchgen.output.ledger import Ledger
from batchgen.storage import TEMPORARY, abort, unfinished_uploads


@dataclass(frozen=True)
class Cleaned:
    """Names of what was removed, or would be removed with ``dry_run``."""

    uploads: tuple[str, ...]
    temporary_files: tuple[str, ...]


def clean(ledger: Ledger, dry_run: bool = False) -> Cleaned:
    """Abort unfinished uploads under the output's own folders and remove its temporary files.

    It holds the output's lease meanwhile, so that no active run loses files that it is writing.

    Raises:
        InputError: the output has no plan.
        OutputBusy: a run is working on it, or on one of its score sets.
    """
    ledger.parts()
    if dry_run:
        return _left(ledger)
    with hold_lease(ledger.store, lambda reason: None) as lease:
        left = _left(ledger)
        for upload in unfinished_uploads(ledger.store):
            abort(ledger.store, upload)
        ledger.store.clear_temporary(older_than_s=0)
        lease.ending = "removed unfinished uploads and temporary files of crashed runs"
    return left


def _left(ledger: Ledger) -> Cleaned:
    uploads = tuple(upload.name for upload in unfinished_uploads(ledger.store))
    temporary = ledger.store.list(TEMPORARY) if ledger.store.local else {}
    return Cleaned(uploads, tuple(sorted(temporary)))
