"""Every tier's fixtures and order; everything offline and on one thread."""

from __future__ import annotations

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as replicas have it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fuzzing import register_profiles
from tests.object_store.fixtures import s3_bucket, s3_proxy, s3_server
from tests.tiers import TIERS, order, scheduler, tier_of

__all__ = ["s3_bucket", "s3_proxy", "s3_server"]  # fixtures of a real S3 server

LOGICAL_CPUS = 4
register_profiles()


def pytest_configure(config: pytest.Config) -> None:
    for tier, about in TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {about}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if tier := tier_of(item.path):
            item.add_marker(tier)
    if all(Path(word.partition("::")[0]).is_dir() for word in config.args):
        order(items)  # files that are named run as they are named


def pytest_collection_finish() -> None:
    """Spare the collector the half a million objects of the libraries, which live to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine, perhaps with more logical CPUs than cores, shared by all tests."""
    import logging

    import ray

    ray.init(
        address="local",
        num_cpus=LOGICAL_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    """Write a table of prompts as Parquet and return its path."""

    def write(texts: int | list[str] = 12, name: str = "prompts.parquet", **columns: Any) -> Path:
        path = tmp_path / name
        if isinstance(texts, int):
            texts = [f"a red circle on a blue background {i}" for i in range(texts)]
        pq.write_table(pa.table({"prompt": texts, **columns}), path)
        return path

    return write
