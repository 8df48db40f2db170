"""Torch's cache of compiled code, for the tests that compile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchgen.models import artifacts


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of compiled code, which the tests of one file share."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHGEN_CACHE", str(folder))
        patch.delenv(artifacts.KEPT_BY_TORCH, raising=False)
        patch.delenv(artifacts.SHARED, raising=False)
        yield folder
    os.environ.pop(artifacts.KEPT_BY_TORCH, None)
