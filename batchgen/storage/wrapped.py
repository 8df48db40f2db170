"""Wraps a seekable binary file, so that subclasses can add to its reads."""

from __future__ import annotations

import io
from typing import BinaryIO


class WrappedFile(io.RawIOBase):
    """Delegates to the inner file; subclasses override ``read``."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
