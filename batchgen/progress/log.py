"""Saves a run's messages in its output, for the command `logs`."""

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
    """Inside, the run's messages are saved every LOG_SECONDS, and at the end with its outcome."""

    def write(ending: str = "") -> None:
        if lease.gone:
            return
        with suppress(BatchgenError, OSError):  # shards report the store's errors already
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
