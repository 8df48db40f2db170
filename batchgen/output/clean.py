"""Removes unfinished uploads and temporary files that crashed runs left in an output."""

from __future__ import annotations

from dataclasses import dataclass

from batchgen.errors import OutputBusy
from batchgen.output.lease import hold_lease, holders_of
from batchgen.output.ledger import Ledger
from batchgen.output.score_set import lease_folder, set_names
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
    for name in set_names(ledger):
        at_work = [one for one in holders_of(ledger.store, lease_folder(name)) if one.at_work]
        if at_work:
            raise OutputBusy(f"score set {name} of {ledger.store.url} is being made ({at_work[0]})")
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
