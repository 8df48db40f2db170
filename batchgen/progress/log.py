"""What a run says is kept in its output, for `logs` and for whoever looks later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from batchgen.errors import BatchgenError
from batchgen.output.lease import Lease
from batchgen.output.ledger import Ledger
from batchgen.progress.display import Progress
from batchgen.secrets import redact
from batchgen.watchdog import watchdog

LOG_SECONDS = 30.0


@contextmanager
def kept(ledger: Ledger, lease: Lease, progress: Progress) -> Iterator[None]:
    """What the run says is kept in its output: every LOG_SECONDS, and in the end how it ended."""

    def write(ending: str = "") -> None:
        if lease.gone:
            return
        with suppress(BatchgenError, OSError):  # the shards' own faults tell of the store
            ledger.log(lease.number, [*progress.said, progress.line(), *filter(None, [ending])])

    ending = ""
    try:
        with watchdog("log", write, LOG_SECONDS):
            yield
    except KeyboardInterrupt:
        ending = "interrupted"
        raise
    except BaseException as error:
        ending = f"ended: {type(error).__name__}: {redact(str(error))}"
        raise
    finally:
        write(ending)
