"""Saves a run's messages in its output, for the command `logs`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from batchgen.errors import BatchgenError
from batchgen.output.lease import Lease
from batchgen.output.ledger import Ledger
from batchgen.progress.display import Progress
from batchgen.secrets import redact

LOG_SECONDS = 30.0


@contextmanager
def kept(ledger: Ledger, lease: Lease, progress: Progress) -> Iterator[None]:
    """Inside, the run's messages are saved every LOG_SECONDS, and at the end with its outcome."""
    over = threading.Event()

    def write(ending: str = "") -> None:
        if lease.gone:
            return
        with suppress(BatchgenError, OSError):  # shards report the store's errors already
            ledger.log(lease.number, [*progress.said, progress.line(), *filter(None, [ending])])

    def keep() -> None:
        while not over.wait(LOG_SECONDS):
            write()

    thread = threading.Thread(target=keep, name="log", daemon=True)
    thread.start()
    ending = ""
    try:
        yield
    except KeyboardInterrupt:
        ending = "interrupted"
        raise
    except BaseException as error:
        ending = f"ended: {type(error).__name__}: {redact(str(error))}"
        raise
    finally:
        over.set()
        thread.join()
        write(ending)
