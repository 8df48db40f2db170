"""Says at intervals how far an import is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from batchgen.cli.echo import echo

if TYPE_CHECKING:
    from batchgen.importing.summary import Summary

_LINE_EVERY_S = 10.0


class ImportLines:
    """Prints a line on stderr every ten seconds; nothing for short imports."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, summary: Summary) -> None:
        now = time.monotonic()
        if now - self._said < _LINE_EVERY_S:
            return
        self._said = now
        total = f"/{summary.total:,}" if summary.total else ""
        rate = summary.rows / (now - self._began)
        echo(
            f"{time.strftime('%H:%M:%S')} rows {summary.rows:,}{total} · {rate:,.0f} rows/s · "
            f"rejected {summary.rejected:,}",
            err=True,
        )
